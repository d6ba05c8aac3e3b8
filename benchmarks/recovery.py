"""kill -9 of a rank → the first new step, beside torchrun (tuned) with the same script in the same
run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.launch import leave
from benchmarks.measure import BIN, HERE, median, save, spread

SCRIPT = HERE / "scripts" / "recovery.py"
KILLS = {"dtp": 100, "torchrun": 10}
HANG_S = 60.0


@dataclass(frozen=True, slots=True)
class Note:
    round: int
    pid: int
    at: float


def newest(folder: Path, rank: int) -> Note | None:
    """The last step that a rank noted."""
    path = folder / f"notes.{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines[-2:]):
        if len(fields := line.split()) == 3:
            return Note(int(fields[0]), int(fields[1]), float(fields[2]))
    return None


def training(folder: Path, after: int, deadline_s: float) -> float | None:
    """Time of the moment when both ranks had a step of a later round than `after`; None: a hang."""
    deadline = time.time() + deadline_s
    while time.time() < deadline:
        notes = [newest(folder, rank) for rank in (0, 1)]
        if all(note and note.round > after for note in notes):
            return _first(folder, after)
        time.sleep(0.005)
    return None


def _first(folder: Path, after: int) -> float:
    """When the later of both ranks finished its first step of the next round."""
    found = []
    for rank in (0, 1):
        rows = [line.split() for line in (folder / f"notes.{rank}").read_text().splitlines()]
        found.append(min(float(r[2]) for r in rows if len(r) == 3 and int(r[0]) > after))
    return max(found)


def measure(folder: Path, kills: int) -> tuple[list[float], int]:
    """Seconds a kill, and how many kills ended in a hang (which ends the series)."""
    found: list[float] = []
    dice = random.Random(0)
    if training(folder, -1, 60) is None:
        return found, 1
    for _ in range(kills):
        time.sleep(dice.uniform(0.2, 0.6))
        victim = newest(folder, dice.randrange(2))
        if victim is None:
            continue
        for rank in (0, 1):
            (folder / f"notes.{rank}").write_text("")
        killed = time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        recovered = training(folder, victim.round, HANG_S)
        if recovered is None:
            return found, 1
        found.append(recovered - killed)
    return found, 0


def dtp(folder: Path) -> tuple[list[float], int]:
    job = folder / "recovery.yaml"
    job.write_text(
        f"name: recovery\nnproc_per_node: 2\nworkdir: {SCRIPT.parent}\nrun: python recovery.py\n"
        f"env: {{BENCH_FILE: {folder / 'notes'}}}\n"
        "checkpoint: {every: 50 steps}\nretry: {on_errors: 1000}\n"
    )
    home = folder / "home"
    env = {**os.environ, "DTP_HOME": str(home)}
    subprocess.run(
        [str(BIN / "dtp"), "run", "--detach", str(job)], env=env, check=True, capture_output=True
    )
    try:
        return measure(folder, KILLS["dtp"])
    finally:
        for verb in ("kill", "wait"):
            subprocess.run(
                [str(BIN / "dtp"), verb, "recovery"], env=env, check=False, capture_output=True
            )
        leave(home)


def torchrun(folder: Path) -> tuple[list[float], int]:
    """Several short series, because a hang ends one."""
    found: list[float] = []
    hangs = 0
    while len(found) + hangs < KILLS["torchrun"]:
        for old in folder.glob("notes*"):
            old.unlink()
        process = subprocess.Popen(
            [
                str(BIN / "torchrun"),
                "--standalone",
                "--nproc-per-node=2",
                "--max-restarts=1000",
                "--monitor-interval=0.1",
                str(SCRIPT),
            ],
            env={**os.environ, "BENCH_FILE": str(folder / "notes")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            more, hung = measure(folder, KILLS["torchrun"] - len(found) - hangs)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        found += more
        hangs += hung
    return found, hangs


def main() -> None:
    results = {}
    for name, contender in (("dtp", dtp), ("torchrun", torchrun)):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = contender(Path(folder))
        print(
            name, len(results[name][0]), "recoveries,", results[name][1], "hangs", file=sys.stderr
        )
    dtp_s, torchrun_s = results["dtp"][0], results["torchrun"][0]
    save(
        "recovery",
        {
            "kill_to_first_step_s": {name: spread(found) for name, (found, _) in results.items()},
            "hangs": {name: hung for name, (_, hung) in results.items()},
            "ratio_to_torchrun": round(median(dtp_s) / median(torchrun_s), 4),
            "goals": {"dtp median s": 0.5, "dtp hangs": 0},
        },
    )
