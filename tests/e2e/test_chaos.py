"""kill -9 of anything at any moment: the job ends with the right loss, and nothing is left.

`DTP_TEST_KILLS=30 pytest tests/e2e/test_chaos.py` is the long form.
"""

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = (Path(__file__).parent / "scripts" / "exact.py").read_text()
KILLS = int(os.environ.get("DTP_TEST_KILLS", "5"))
EPOCHS = 12 + 10 * KILLS
"""20 steps each of at least 15 ms: long enough for every kill to hit a job that trains."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def submit(dtp: Any, job_file: Callable[..., Path], name: str, pace: float) -> tuple[str, Path]:
    path = job_file(
        SCRIPT,
        name,
        nodes=2,
        resources={"cpus": 0.5},
        checkpoint={"every": "10 steps"},
        retry={"on_errors": 1000},
    )
    folder = path.parent / "notes"
    folder.mkdir()
    env = {"NOTES": str(folder), "EPOCHS": str(EPOCHS), "PACE": str(pace)}
    path.write_text(path.read_text() + f"env: {json.dumps(env)}\n")
    dtp.run("run", "--detach", path)
    return path.stem, folder


def kept(folder: Path) -> dict[int, list[str]]:
    """Step → losses by rank of its last execution."""
    found: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("rank*.txt")):
        for line in path.read_text().splitlines():
            if len(fields := line.split()) == 14:  # a line cut by a kill has fewer
                found.setdefault(int(fields[0]), {})[path.stem] = fields[1]
    return {step: sorted(losses.values()) for step, losses in found.items()}


def victims(dtp: Any, target: str) -> Sequence[psutil.Process]:
    if target == "machine":
        return [p for p in dtp.processes() if p.pid != os.getpid()]
    return dtp.kinds()[target][:1]


@pytest.mark.parametrize("target", ["rank", "agent", "controller", "client", "machine"])
def test_a_killed_part_costs_time_and_nothing_else(
    dtp: Any, job_file: Callable[..., Path], target: str
) -> None:
    """Losses of the kept steps are those of an undisturbed job; no process and no event is lost."""
    calm, calm_notes = submit(dtp, job_file, "calm", 0.0)
    dtp.run("wait", calm, timeout=600)
    rough, rough_notes = submit(dtp, job_file, "rough", 0.015)
    clock, hits = random.Random(target), 0
    watcher = dtp.start("wait", rough)
    while hits < KILLS and dtp.job(rough)["state"] != "SUCCEEDED":
        time.sleep(clock.uniform(0.1, 1.5))
        found = victims(dtp, target)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        hits += bool(found)
        if watcher.poll() is not None:
            watcher.communicate()
            watcher = dtp.start("wait", rough)
    dtp.run("wait", rough, timeout=900)
    watcher.communicate(timeout=60)
    assert hits >= KILLS
    assert kept(rough_notes) == kept(calm_notes)
    assert dtp.rows("ckpt", "ls", rough)[-1]["step"] == EPOCHS * 20
    events = dtp.rows("events", rough)
    assert len({event["seq"] for event in events}) == len(events)
    dtp.until(lambda: not dtp.kinds()["rank"] and not dtp.kinds()["agent"], "nothing left")
