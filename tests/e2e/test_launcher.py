"""`launcher: torchrun` in a job file: everything an operator does goes as it goes without."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = (Path(__file__).parent / "scripts" / "exact.py").read_text()
EPOCHS, STEPS = 4, 80

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def rank(dtp: Any, number: str) -> psutil.Process | None:
    """The script's own process of a rank."""
    for process in dtp.processes():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == number and process.cmdline()[1:] == ["train.py"]:
                found: psutil.Process = process
                return found
    return None


def test_a_job_under_torchrun(warm: Any, job_file: Callable[..., Path]) -> None:
    """Train, pause, resume, lose a rank, finish: every step was taken once or more, and the ranks
    were torchrun's."""
    path = job_file(
        SCRIPT,
        nproc_per_node=2,
        resources={"cpus": 0.5},
        launcher="torchrun",
        checkpoint={"every": "10 steps"},
    )
    notes = path.parent / "notes"
    notes.mkdir()
    env = {"NOTES": str(notes), "EPOCHS": str(EPOCHS), "PACE": "0.1"}
    path.write_text(path.read_text() + f"env: {json.dumps(env)}\n")
    name = path.stem
    warm.run("run", "--detach", path)
    warm.until(lambda: (warm.job(name).get("step") or 0) >= 10, "step 10", 90)
    warm.run("pause", name)
    warm.run("wait", name, "--until", "PAUSED")
    assert warm.job(name)["step"] > 0
    warm.run("resume", name)
    victim = warm.until(lambda: rank(warm, "1"), "rank 1")
    assert victim.environ()["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    warm.until(lambda: (warm.job(name).get("step") or 0) >= 35, "step 35", 90)
    victim.kill()
    warm.run("wait", name, timeout=120)
    for number in (0, 1):
        lines = (notes / f"rank{number}.txt").read_text().splitlines()
        assert {int(line.split()[0]) for line in lines} == {*range(1, STEPS + 1)}
