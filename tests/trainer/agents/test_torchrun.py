"""`launcher: torchrun`: torchrun's own agent starts the ranks, and nothing else is different."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job

SESSION = """
import os, time
import torch
import torch.distributed as dist
from dtp_trainer.session import Session

net = torch.nn.Linear(4, 1)
session = Session(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.01))
model = session.ddp(net)
assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True", "this is not torchrun"
print("world", dist.get_world_size(), "from", session.global_step, flush=True)
data = [torch.ones(4) for _ in range(4)]
for batch in session.batches(data, global_batch=4, steps=int(os.environ["STEPS"])):
    model(batch).sum().backward()
    time.sleep(0.02)
    session.step(loss=1.0)
session.finish()
"""


def options(steps: int, **more: object) -> dict[str, object]:
    checkpoint = {"every_s": None, "every_steps": 10, "keep": 3, "keep_best": None}
    env = {"OMP_NUM_THREADS": "1", "STEPS": str(steps)}
    return {"launcher": "torchrun", "env": env, "checkpoint": checkpoint, **more}


def torchruns(job: Job) -> set[psutil.Process]:
    """The parents of what stands between torchrun and its ranks."""
    between = [p for p in job.processes() if "under_torchrun" in " ".join(p.cmdline())]
    return {parent for process in between if (parent := process.parent()) is not None}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_train_kill_pause_resume(job: Job) -> None:
    """Two workers of two ranks train, survive a killed rank, pause with 75, go on, and end with
    0; every line has its rank's name."""
    (job.work / "train.py").write_text(SESSION)
    workers = job.train(2, nproc_per_node=2, **options(100_000))
    job.until(lambda: job.stepped(1, world_size=4), timeout=90)
    assert len(torchruns(job)) == 2
    for pid in workers[1].ranks()[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.until(lambda: job.stepped(2, world_size=4), timeout=60)
    assert any(text.endswith("failed: killed by SIGKILL") for text in job.texts())
    for worker in workers:
        worker.ask()
    assert job.codes() == [75, 75]
    gang = job.gang()
    assert gang is not None
    assert gang.errors_used == 1
    assert gang.step is not None
    job.launch(0, attempt=2, **options(gang.step + 20, nproc_per_node=2, workers=1))
    assert job.workers[-1].ended(90) == 0
    told = job.workers[-1].texts()
    assert told.count(f"world 2 from {gang.step}") == 2
    assert not list((job.workers[-1].folder / "scratch").glob("torchrun.*"))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_script_of_torchruns(job: Job) -> None:
    """Its own exit code and error are told, not torchrun's; and its process group is seen."""
    script = "import torch.distributed as dist, sys, time\ndist.init_process_group('gloo')\n"
    script += "time.sleep(1)\ndist.barrier()\n"
    (job.work / "train.py").write_text(script)
    job.train(1, nproc_per_node=2, **options(0))
    assert job.workers[0].ended(90) == 0
    assert "no_steps" not in job.story()
    (job.work / "train.py").write_text(
        "import os\nif os.environ['RANK'] == '1': exit(7)\n" + script
    )
    job.launch(1, attempt=2, nproc_per_node=2, **options(0, error_budget=0, workers=1))
    assert job.workers[1].ended(90) == 7
    assert job.workers[1].exit()["reason"] == "rank 1 failed: no error message"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_killed_torchrun(job: Job) -> None:
    """torchrun's own death is a failure of its ranks, which end with it; the next one trains. A
    killed agent leaves nothing of it."""
    (job.work / "train.py").write_text(SESSION)
    (worker,) = job.train(1, nproc_per_node=2, **options(100_000))
    job.until(lambda: job.stepped(1), timeout=90)
    ranks = worker.ranks()
    for process in torchruns(job):
        process.kill()
    job.until(lambda: job.stepped(2), timeout=60)
    assert not any(psutil.pid_exists(pid) for pid in ranks)
    worker.ask(signal.SIGKILL)
    assert worker.ended() == -signal.SIGKILL
