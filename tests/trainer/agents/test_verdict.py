"""What a job's steps are bound by, as its leader tells it of real ranks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job

SCRIPT = """
import sys
import time
import torch
from torch import nn
from dtp_trainer.session.session import Session

case = sys.argv[1]

class Data:
    def __len__(self):
        return 100_000
    def __getitems__(self, indices):
        if case == "data":
            time.sleep(0.15)
        return torch.ones(len(indices), 64)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
session = Session(model=model, optimizer=optimizer)
ddp = session.ddp(model)
for batch in session.batches(Data(), global_batch=8, steps=5000):
    loss = ddp(batch).square().mean()
    loss.backward()
    if case == "straggler" and session.rank == 1:
        time.sleep(0.15)
    optimizer.step()
    optimizer.zero_grad()
    session.step(loss=loss)
session.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "verdict", "phase"),
    [("straggler", "straggler rank 1", "comm"), ("data", "data-bound", "data")],
)
def test_verdict_of_real_ranks(job: Job, case: str, verdict: str, phase: str) -> None:
    """A rank that holds the others up is named; data that is slow for all is called so."""
    (job.work / "slow.py").write_text(SCRIPT)
    job.options = {"env": {}, "workers": 2, "command": ["python", "slow.py", case]}
    workers = job.launch(0, 1)
    gang = job.until(lambda: (seen := job.gang()) and seen.verdict == verdict and seen, timeout=60)
    assert gang.step_s is not None
    assert gang.step_s > 0.15
    assert sum(gang.phases.values()) == pytest.approx(1, abs=0.01)
    assert gang.phases[phase] > 0.15
    assert ("in backward" in gang.verdict_why) == (case == "straggler")
    for worker in workers:
        worker.ask()
    assert job.codes() == [75, 75]


@pytest.mark.slow
def test_a_worker_prints_one_window_a_second_however_many_ranks_and_steps(job: Job) -> None:
    """Four ranks with a thousand steps each are a line a second, and no more than one a second of
    the machine."""
    busy = (
        "import json, os, time\nenv = os.environ\n"
        "record = dict(at=0.0, generation=1, rank=int(env['RANK']), world_size=4, epoch=0.0,\n"
        "    total_steps=3000, samples=8, tokens=None, values={}, seconds={'step': 0.001})\n"
        "with open(env['DTP_STEPS_FILE'], 'a', buffering=1) as file:\n"
        "    for step in range(1, 3001):\n"
        "        time.sleep(0.001)\n"
        "        file.write(json.dumps({**record, 'step': step, 'at': time.time()}) + chr(10))\n"
    )
    (job.work / "busy.py").write_text(busy)
    (worker,) = job.launch(0, workers=1, nproc_per_node=4, command=["python", "busy.py"])
    assert worker.ended() == 0
    windows, hosts = worker.windows(), [r for r in worker.log() if hasattr(r, "cpu_percent")]
    assert sum(window.steps for window in windows if window.rank == 0) == 3000
    lasted = windows[-1].at - windows[0].at
    assert len(windows) <= lasted + 3
    assert len(hosts) <= lasted + 5
    assert len(json.dumps(windows[0].to_dict())) < 2000
