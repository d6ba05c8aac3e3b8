"""Real ranks with a real session: what a failure costs is said, and a change of size costs
nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from dtp_trainer import wire

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job

SCRIPT = """
import os, time
from pathlib import Path
import torch
from dtp_trainer.session import Session

net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
session = Session(model=net, optimizer=optimizer)
model = session.ddp(net)
notes = Path(os.environ["NOTES"]) / f"g{os.environ['DTP_GENERATION']}.r{session.rank}"
while True:
    loss = model(torch.ones(2, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(0.02)
    with notes.open("a") as file:
        file.write(f"{session.global_step + 1}\\n")
    session.step(loss=loss, samples=2)
"""


def taken(job: Job, generation: int) -> list[int]:
    """Steps that rank 0 took in a generation."""
    path = job.folder / "notes" / f"g{generation}.r0"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def resumed(job: Job) -> list[wire.GangEvent]:
    gang = job.gang()
    return [event for event in gang.events if event.name == "resumed"] if gang else []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_kill_and_scale(job: Job) -> None:
    """A kill redoes exactly the steps behind the checkpoint, and the event says so with their
    seconds; growing and shrinking redo none."""
    (job.work / "train.py").write_text(SCRIPT)
    notes = job.folder / "notes"
    notes.mkdir()
    checkpoint = {"every_s": None, "every_steps": 25, "keep": 3, "keep_best": None}
    env = {"NOTES": str(notes), "OMP_NUM_THREADS": "1"}
    (first,) = job.train(1, env=env, checkpoint=checkpoint)
    job.until(lambda: len(taken(job, 1)) > 40, timeout=90)
    for pid in first.ranks():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.until(lambda: resumed(job))
    job.launch(1, workers=2)
    job.until(lambda: len(resumed(job)) == 2)
    first.ask()
    job.until(lambda: len(resumed(job)) == 3)
    lost, grown, shrunk = resumed(job)
    done, again = taken(job, 1), taken(job, 2)
    said = re.fullmatch(
        r"went back from step (\d+) to (\d+): (\d+) steps?, ([\d.]+) s of training lost", lost.text
    )
    assert said is not None, lost.text
    assert int(said[2]) == again[0] - 1
    assert int(said[2]) % 25 == 0
    assert int(said[1]) in (done[-1], done[-1] - 1)  # The last step's record may be torn.
    assert float(said[4]) >= 0.9 * 0.02 * int(said[3])
    for event in (grown, shrunk):
        assert event.text == f"goes on at step {event.step}: no step redone"
    later = [step for generation in (2, 3, 4) for step in taken(job, generation)]
    assert all(b == a + 1 for a, b in pairwise(later))
    for worker in job.workers:
        worker.ask()
    assert job.codes() == [75, 75]
