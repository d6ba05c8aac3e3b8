"""Plain DistributedDataParallel, forked from a warm process, with no `Session` in sight."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job

SCRIPT = """
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
print("formed", dist.get_world_size(), flush=True)
for step in range(int(sys.argv[1])):
    model(torch.randn(8, 4)).sum().backward()
total = torch.ones(1)
dist.all_reduce(total)
print("sum", int(total), flush=True)
dist.destroy_process_group()
"""

REPORTER = """
import json, os, sys, time

file = open(os.environ["DTP_STEPS_FILE"], "a", buffering=1)
def load(step):
    if step == 5 and os.environ["RANK"] == "1":
        time.sleep(1000)
def report(step):
    record = dict(at=time.time(), generation=int(os.environ["DTP_GENERATION"]),
        rank=int(os.environ["RANK"]), world_size=2, step=step, epoch=0.0, total_steps=None,
        samples=8, tokens=None, values={}, seconds={"step": 0.1})
    file.write(json.dumps(record) + chr(10))
"""


@pytest.fixture
def ddp(job: Job) -> Job:
    (job.work / "ddp.py").write_text(SCRIPT)
    job.options = {"env": {}, "workers": 2}
    return job


def test_torchruns_script_runs_unchanged(ddp: Job) -> None:
    """A script written for torchrun forms its group, trains and ends well, and counts as work."""
    ddp.launch(0, 1, command=["python", "ddp.py", "20"])
    assert ddp.codes() == [0, 0]
    assert [text for worker in ddp.workers for text in worker.texts() if "sum" in text] == [
        "sum 2"
    ] * 2
    assert "no_steps" not in ddp.story()


def test_killed_rank_of_ddp(ddp: Job) -> None:
    """kill -9 of a rank: nobody waits for the other, the signal is blamed, a new group forms."""
    workers = ddp.launch(0, 1, command=["python", "ddp.py", "1000000"])
    ddp.until(lambda: all("formed 2" in worker.texts() for worker in workers), timeout=90)
    for pid in workers[1].ranks():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ddp.until(lambda: all(worker.texts().count("formed 2") == 2 for worker in workers))
    assert "rank 1 failed: killed by SIGKILL" in ddp.texts()
    for worker in workers:
        worker.ask()
    assert ddp.codes() == [75, 75]


def test_hanging_rank_of_ddp(ddp: Job) -> None:
    """A rank that stands still while the others wait for it in a collective is named, with the
    line at which it stands."""
    script = SCRIPT.replace("import sys\n", REPORTER).replace(
        "for step in range(int(sys.argv[1])):\n",
        "for step in range(1, int(sys.argv[1])):\n    load(step)\n",
    )
    (ddp.work / "ddp.py").write_text(script.replace(".backward()", ".backward(); report(step)"))
    command = ["python", "ddp.py", "1000000"]
    ddp.launch(0, 1, command=command, no_step_for_s=2.0, hang_budget=0)
    assert ddp.codes() == [77, 77]
    reason = ddp.workers[0].exit()["reason"]
    assert reason.startswith("rank 1 is behind: it stands in load (ddp.py:")
    assert reason.endswith("the others wait since step 4")


def test_raising_rank_of_ddp(ddp: Job) -> None:
    """The rank that raised is blamed, not the one that lost its peer by it."""
    script = SCRIPT.replace(
        "for step", "if dist.get_rank() == 1: raise ValueError('bad batch')\nfor step"
    )
    (ddp.work / "ddp.py").write_text(script)
    ddp.launch(0, 1, command=["python", "ddp.py", "1000000"], error_budget=0)
    assert ddp.codes() == [1, 1]
    assert "ValueError: bad batch" in ddp.workers[0].exit()["reason"]
    assert ddp.workers[0].exit()["reason"].startswith("rank 1 failed")
