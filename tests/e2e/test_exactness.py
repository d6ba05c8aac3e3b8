"""What a job learns does not depend on how often it was interrupted."""

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = (Path(__file__).parent / "scripts" / "exact.py").read_text()
EPOCHS, STEPS_AN_EPOCH, SAMPLES = 6, 20, 480
TOTAL = EPOCHS * STEPS_AN_EPOCH

pytestmark = pytest.mark.timeout(300)


def notes(folder: Path) -> dict[int, dict[int, tuple[str, tuple[int, ...]]]]:
    """Step → rank → (loss, sample ids) of its last, that is kept, execution."""
    found: dict[int, dict[int, tuple[str, tuple[int, ...]]]] = {}
    for path in folder.glob("rank*.txt"):
        for line in path.read_text().splitlines():
            step, loss, *ids = line.split()
            rank = int(path.stem.removeprefix("rank"))
            found.setdefault(int(step), {})[rank] = (loss, tuple(map(int, ids)))
    return found


def submit(
    warm: Any, job_file: Callable[..., Path], name: str, pace: float, **fields: Any
) -> tuple[str, Path]:
    """Start the job detached; its name and the folder of its notes."""
    path = job_file(SCRIPT, name, nodes="1..3", resources={"cpus": 0.5}, **fields)
    folder = path.parent / "notes"
    folder.mkdir()
    env = {"NOTES": str(folder), "EPOCHS": str(EPOCHS), "PACE": str(pace)}
    path.write_text(path.read_text() + f"env: {json.dumps(env)}\n")
    warm.run("run", "--detach", path)
    return path.stem, folder


OPTIONS = {
    "halves": {
        "precision": "bf16",
        "accumulate": 2,
        "clip_grad_norm": 1.0,
        "comm_hook": "powersgd",
        "prefetch": 4,
    },
    "scaled": {
        "precision": "fp16",
        "shard": "optimizer",
        "fused_optimizer": True,
        "comm_hook": "fp16",
        "gradient_as_bucket_view": True,
        "non_finite": "skip",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_leave_an_interrupted_loss_curve_as_it_was(
    warm: Any, job_file: Callable[..., Path], name: str
) -> None:
    """Paused once and a rank killed once, at steps that differ from run to run: every loss is that
    of the job that nobody touched, to the bit."""
    fields = {"training": OPTIONS[name], "checkpoint": {"every": "10 steps"}}
    plain, plain_notes = submit(warm, job_file, "plain", 0.0, **fields)
    warm.run("wait", plain)
    broken, broken_notes = submit(warm, job_file, "broken", 0.15, **fields)
    first, second = random.randint(12, 30), random.randint(40, 60)
    warm.until(past(warm, broken, first), f"step {first}")
    warm.run("pause", broken)
    warm.run("wait", broken, "--until", "PAUSED")
    warm.run("resume", broken)
    warm.until(past(warm, broken, second), f"step {second}")
    warm.kinds()["rank"][0].send_signal(signal.SIGKILL)
    warm.run("wait", broken)
    assert notes(broken_notes) == notes(plain_notes), f"paused at {first}, killed at {second}"
    assert sorted(notes(plain_notes)) == list(range(1, TOTAL + 1))


def past(warm: Any, name: str, step: int) -> Callable[[], bool]:
    return lambda: (warm.job(name).get("step") or 0) >= step


def test_three_pauses_leave_the_loss_curve_as_it_was(
    warm: Any, job_file: Callable[..., Path]
) -> None:
    """At the same world size every loss is identical to the bit, dropout included."""
    plain, plain_notes = submit(warm, job_file, "plain", 0.0)
    warm.run("wait", plain)
    broken, broken_notes = submit(warm, job_file, "broken", 0.2)
    for step in (15, 35, 60):
        warm.until(past(warm, broken, step), f"step {step}")
        warm.run("pause", broken)
        warm.run("wait", broken, "--until", "PAUSED")
        warm.run("resume", broken)
    warm.run("wait", broken)
    assert notes(broken_notes) == notes(plain_notes)
    assert sorted(notes(plain_notes)) == list(range(1, TOTAL + 1))


def test_every_sample_comes_once_an_epoch_at_any_number_of_workers(
    warm: Any, job_file: Callable[..., Path]
) -> None:
    """3 → 1 → 2 workers go on in the middle of an epoch with the same global batches."""
    plain, plain_notes = submit(warm, job_file, "plain", 0.0)
    warm.run("wait", plain)
    scaled, scaled_notes = submit(warm, job_file, "scaled", 0.2)
    for step, workers in ((25, 1), (65, 2)):
        warm.until(past(warm, scaled, step), f"step {step}")
        warm.run("scale", scaled, workers)
    warm.run("wait", scaled)
    whole, pieces = notes(plain_notes), notes(scaled_notes)
    for step in range(1, TOTAL + 1):
        assert batch(pieces[step]) == batch(whole[step]), f"step {step}"
    for epoch in range(EPOCHS):
        steps = range(1 + epoch * STEPS_AN_EPOCH, 1 + (epoch + 1) * STEPS_AN_EPOCH)
        seen = Counter(sample for step in steps for sample in batch(pieces[step]))
        assert seen == Counter(range(SAMPLES))


def batch(ranks: dict[int, tuple[str, tuple[int, ...]]]) -> list[int]:
    return sorted(sample for _, ids in ranks.values() for sample in ids)
