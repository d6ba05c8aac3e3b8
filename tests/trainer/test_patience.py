"""How long ranks wait for each other: a minute to come together, long to start, briefly to step."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import pytest

from dtp_trainer.gang.ports import HeldPort

SCRIPT = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from dtp_trainer.session.distributed import join

def waits(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

world = join()
group = dist.distributed_c10d._get_default_group()
print(waits(group), waits(world.agreement))
world.wait_briefly()
print(waits(group), waits(world.agreement))
world.wait_long()
print(waits(group), waits(world.agreement), flush=True)
world._wait_at_most(timedelta(seconds=0.5))
if world.rank == 1:
    sys.stdin.read()  # Never comes to the collective.
    os._exit(0)
try:
    world.maximum([1])
except RuntimeError as error:
    print("gave up:", "imed out" in str(error), flush=True)
    os._exit(0)
"""


def rank(number: int, port: int) -> subprocess.Popen[str]:
    env = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ours = {"MASTER_PORT": str(port), "DTP_GENERATION": "1", "DTP_NO_STEP_FOR": "100"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **env, **ours},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_group_waits_as_long_as_it_should() -> None:
    """Both groups wait long until the first step, then twice `no_step_for`, and again long for a
    last checkpoint; and gloo gives up when that is over."""
    with HeldPort() as port:
        ranks = [rank(number, port.number) for number in (0, 1)]
        told = ranks[0].communicate(timeout=60)[0].splitlines()
        ranks[1].communicate(timeout=60)
    long = str(timedelta(minutes=30).total_seconds())
    assert told == [f"{long} {long}", "200.0 200.0", f"{long} {long}", "gave up: True"]
