"""Command → first optimizer step → exit of one two-rank job, beside torchrun with the same script
in the same run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import BIN, HERE, median, save, spread

ROUNDS = 5
TRIES = 10
SCRIPT = HERE / "scripts" / "plain.py"


def torchrun(folder: Path, crashes: list[str]) -> tuple[float, float]:
    """Tried again when a rank aborts while torch 2.13 tears its process group down."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    while len(crashes) < TRIES:
        try:
            return _timed(command, folder, home=folder)
        except RuntimeError as error:
            crashes.append(str(error))
    sys.exit(crashes[-1])


def dtp(folder: Path, home: Path) -> tuple[float, float]:
    job = folder / "plain.yaml"
    job.write_text(
        f"name: plain\nnproc_per_node: 2\nworkdir: {SCRIPT.parent}\nrun: python plain.py\n"
        f"env: {{BENCH_FILE: {folder / 'first'}}}\n"
    )
    return _timed([str(BIN / "dtp"), "run", "--headless", str(job)], folder, home=home)


def leave(home: Path) -> None:
    """End what a warm home keeps alive."""
    env = {**os.environ, "DTP_HOME": str(home)}
    subprocess.run(
        [str(BIN / "dtp"), "controller", "stop"], env=env, capture_output=True, check=False
    )
    subprocess.run(["pkill", "-f", str(home / "zygotes")], capture_output=True, check=False)


def _timed(command: list[str], folder: Path, *, home: Path) -> tuple[float, float]:
    """Seconds from the command to its first step, and to its exit."""
    mark = folder / "first"
    mark.unlink(missing_ok=True)
    env = {**os.environ, "BENCH_FILE": str(mark), "DTP_HOME": str(home)}
    started = time.time()
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return float(mark.read_text()) - started, time.time() - started


def main() -> None:
    names = ("torchrun", "dtp cold", "dtp warm")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    crashes: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, warm = Path(temporary), Path(temporary) / "warm"
        dtp(folder, warm)
        for number in range(ROUNDS):
            cold = folder / f"cold{number}"
            found["torchrun"].append(torchrun(folder, crashes))
            found["dtp cold"].append(dtp(folder, cold))
            leave(cold)
            found["dtp warm"].append(dtp(folder, warm))
        leave(warm)
    first = {name: [pair[0] for pair in found[name]] for name in names}
    whole = {name: [pair[1] for pair in found[name]] for name in names}
    save(
        "launch",
        {
            "first_step_s": {name: spread(first[name]) for name in names},
            "exit_s": {name: spread(whole[name]) for name in names},
            "ratio_to_torchrun": {
                name: {
                    "first_step": round(median(first[name]) / median(first["torchrun"]), 3),
                    "exit": round(median(whole[name]) / median(whole["torchrun"]), 3),
                }
                for name in names[1:]
            },
            "torchrun_crashes_at_exit": len(crashes),
            "goals": {"dtp cold": 0.7, "dtp warm": 0.3},
        },
    )
