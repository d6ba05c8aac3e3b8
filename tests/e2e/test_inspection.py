"""What a running job does can be seen, and where a deadlocked one stands."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

SCRIPT = (Path(__file__).parent / "scripts" / "skips.py").read_text()


TRAINS = """\
import torch
from dtp_trainer.session import Session
net = torch.nn.Linear(4, 1)
session = Session(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
model = session.ddp(net)
for batch in session.batches(torch.randn(64, 4), global_batch=8, epochs=100):
    loss = model(batch).square().mean()
    loss.backward()
    session.step(loss=loss)
session.finish()
"""


@pytest.fixture(scope="module")
def half() -> dict[str, Any]:
    return {"nodes": 2, "resources": {"cpus": 0.5}}


def test_a_deadlock_is_found_named_and_survived(
    warm: Any, job_file: Callable[..., Path], half: dict[str, Any]
) -> None:
    """One rank skips a collective: both stand still, the one that skipped it is named with its
    line, `show` tells where each stood, and the job goes on within the budget for hangs alone."""
    path = job_file(
        SCRIPT,
        name="deadlock",
        **half,
        env={"STEPS": "12"},
        watchdog={"no_step_for": "3s"},
        retry={"on_hang": 1, "on_errors": 0},
    )
    warm.run("run", "--headless", path)
    hang = warm.job(path.stem)["hang"]
    backward = 1 + SCRIPT.splitlines().index("    loss.backward()")
    assert (hang["generation"], hang["rank"]) == (1, 1)
    assert f"rank 1 waits in <module> (train.py:{backward})" in hang["text"]
    assert [stack["rank"] for stack in hang["stacks"]] == [1, 0]
    assert any("all_reduce" in line for line in hang["stacks"][1]["lines"])
    text = warm.run("show", path.stem)
    assert text.index("  rank 1\n") < text.index("  rank 0\n") < text.index("submitted")
    assert "Current thread" not in text
    assert "Current thread" in warm.run("show", path.stem, "--stacks")


def test_a_running_job_is_profiled(
    warm: Any, job_file: Callable[..., Path], half: dict[str, Any], tmp_path: Path
) -> None:
    """The same steps of both ranks come as traces with our marks and the operators of the model;
    the job goes on, and its timeline says who looked."""
    path = job_file(
        SCRIPT.replace("deaf = ", "deaf = False and "),
        name="watched",
        **half,
        env={"STEPS": "1000000", "PACE": "0.02"},
    )
    warm.run("run", "--detach", path)
    warm.until(lambda: warm.job(path.stem)["step"], "a step")
    restarts = warm.job(path.stem)["generation"]
    options = ("--steps", "3", "--rank", "all", "--memory", "--out", tmp_path)
    first, second = warm.rows("profile", path.stem, *options)
    assert (first["first_step"], first["last_step"]) == (second["first_step"], second["last_step"])
    for answer in (first, second):
        trace, summary = map(Path, answer["files"])
        names = {
            event.get("name")
            for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        }
        marks = {
            f"ProfilerStep#{step}" for step in range(answer["first_step"], answer["last_step"] + 1)
        }
        assert names >= {*marks, "aten::addmm", "DistributedDataParallel.forward"}
        assert "aten::" in summary.read_text()
    assert "rank 7" in _refusal(warm, path.stem, "--rank", "7")
    events = warm.run("events", path.stem)
    assert "asked for a memory profile of 3 steps of all ranks" in events
    assert warm.job(path.stem)["generation"] == restarts
    warm.run("kill", path.stem)
    warm.run("wait", path.stem, code=3)


def test_a_try_of_some_steps(warm: Any, job_file: Callable[..., Path]) -> None:
    """--nproc and --steps make a small job that ends well after so many steps and keeps nothing."""
    path = job_file(TRAINS, name="try", nodes="2..4", nproc_per_node=2)
    rows = warm.rows("run", path, "--nproc", "1", "--steps", "5")
    said = [row["text"] for row in rows if row["event"] == "log"]
    assert rows[-1]["state"] == "SUCCEEDED"
    assert (rows[-1]["steps"], rows[-1]["checkpoint"]) == (5, None)
    told = next(text for text in said if "ended after 5 steps, as asked" in text)
    assert "ms a step" in told
    assert "samples/s" in told
    assert warm.job(path.stem)["spec"]["nodes"] == "1"


def _refusal(warm: Any, *words: str) -> str:
    warm.run("profile", *words, code=2)
    assert warm.stderr.count("\n") == 1
    return str(warm.stderr)
