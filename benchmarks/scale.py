"""A running job from 2 workers to 3 and back, without a step redone: from the new worker being up
to its first step, and from the wish to the first step; beside torchrun (tuned) in the same run."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.elastic import HANG_S, Dtp, Home, Note, Torchrun, figures, running
from benchmarks.measure import save

ROUNDS = {"dtp": 8, "torchrun": 3}
READY_S = 120.0
PAUSE_S = 1.0
"""Between two changes, for a checkpoint of torchrun's script to lie behind."""


class Changes:
    """What changes of one size took; None of them hung."""

    def __init__(self) -> None:
        self.from_wish: list[float] = []
        self.from_worker: list[float] = []
        self.redone: list[int] = []
        self.hangs = 0

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"wish_to_first_step_s": figures(self.from_wish)}
        if self.from_worker:
            found["worker_up_to_first_step_s"] = figures(self.from_worker)
        return {**found, "steps_redone": sum(self.redone), "hangs": self.hangs}


def redone(before: Sequence[Note], after: Sequence[Note]) -> int:
    """Steps of rank 0 that the next group took again."""
    last = max((note.step for note in before), default=0)
    first = min((note.step for note in after), default=last + 1)
    return max(0, last - first + 1)


def settled(job: Dtp | Torchrun, size: int, found: Changes) -> set[int] | None:
    """The processes of a group of this size that trains; None: there is none in time."""
    if job.notes.formed(size, without=set(), within_s=READY_S) is None:
        found.hangs += 1
        return None
    time.sleep(PAUSE_S)
    return job.notes.pids()


def note(
    job: Dtp | Torchrun, size: int, before: set[int], wished: float, found: Changes
) -> float | None:
    """Wait for the group of the new size, and write down what it took; when it first stepped."""
    at = job.notes.formed(size, without=before, within_s=HANG_S)
    if at is None:
        found.hangs += 1
        return None
    rank0 = job.notes.read()[0]
    fresh = [n for n in rank0 if n.pid not in before]
    found.from_wish.append(at - wished)
    found.redone.append(redone([n for n in rank0 if n.pid in before], fresh))
    return at


def dtp(folder: Path) -> dict[str, Changes]:
    found = {"2 -> 3": Changes(), "3 -> 2": Changes()}
    with running(lambda: Home(folder)) as home, running(lambda: Dtp(home, "1..3")) as job:
        before = settled(job, 3, found["2 -> 3"])
        for number in range(2 * ROUNDS["dtp"]):
            size, sign = (2, "3 -> 2") if number % 2 == 0 else (3, "2 -> 3")
            changes = found[sign]
            if before is None:
                break
            wished = time.time()
            job.scale(size)
            at = note(job, size, before, wished, changes)
            moved = "worker_joined" if size == 3 else "worker_leaving"
            told = job.event(moved, wished)
            if at is not None and told is not None:
                changes.from_worker.append(at - told)
            job.notes.clear()
            before = settled(job, size, changes)
    return found


def torchrun(folder: Path) -> dict[str, Changes]:
    """`worker up` is not known of it: its agent says nothing before the group forms."""
    found = {"2 -> 3": Changes(), "3 -> 2": Changes()}
    for _ in range(ROUNDS["torchrun"]):
        for old in folder.glob("notes*"):
            old.unlink()
        with running(lambda: Torchrun(folder, 2)) as job:
            before = settled(job, 2, found["2 -> 3"])
            if before is None:
                continue
            wished = time.time()
            job.agents.append(job.join())
            if note(job, 3, before, wished, found["2 -> 3"]) is None:
                continue
            before = settled(job, 3, found["3 -> 2"])
            if before is None:
                continue
            wished = time.time()
            job.kill(job.agents[-1], signal.SIGTERM)
            note(job, 2, before, wished, found["3 -> 2"])
    return found


def main() -> None:
    results = {}
    for name, contender in (("dtp", dtp), ("torchrun", torchrun)):
        with tempfile.TemporaryDirectory() as folder:
            found = contender(Path(folder))
        results[name] = {sign: changes.to_dict() for sign, changes in found.items()}
        print(name, results[name], file=sys.stderr)
    save(
        "scale",
        {
            **results,
            "goals": {"dtp worker up to first step, median s": 1.0, "dtp steps redone": 0},
        },
    )
