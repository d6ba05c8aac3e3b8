"""Samples a second of one worker and of two with the same work each, beside bare torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.launch import leave
from benchmarks.measure import BIN, HERE, interleaved, save, spread

ROUNDS = int(os.environ.get("DTP_BENCH_ROUNDS", "3"))
SCRIPT = HERE / "scripts" / "efficiency.py"


class Bench:
    """Runs the script with so many workers of one core each."""

    def __init__(self, folder: Path) -> None:
        self._mark, self._folder = folder / "speed", folder
        self.home = folder / "home"
        self._env = {
            **os.environ,
            "DTP_HOME": str(self.home),
            "BENCH_FILE": str(self._mark),
            "OMP_NUM_THREADS": "1",
        }

    def torchrun(self, workers: int) -> float:
        torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(workers)]
        return self._speed([*torchrun, str(SCRIPT), "bare"])

    def dtp(self, workers: int) -> float:
        job = self._folder / f"efficiency{workers}.yaml"
        job.write_text(
            f"name: efficiency{workers}\nnodes: {workers}\nworkdir: {SCRIPT.parent}\n"
            "run: python efficiency.py session\nresources: {cpus: 1}\n"
            f"env: {{BENCH_FILE: {self._mark}, OMP_NUM_THREADS: '1'}}\n"
        )
        return self._speed([str(BIN / "dtp"), "run", "--headless", str(job)])

    def _speed(self, command: list[str]) -> float:
        self._mark.unlink(missing_ok=True)
        done = subprocess.run(
            command, env=self._env, check=False, capture_output=True, text=True, cwd=SCRIPT.parent
        )
        if done.returncode or not self._mark.exists():
            sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return float(self._mark.read_text())


def figures(one: list[float], two: list[float]) -> dict[str, Any]:
    """Efficiency by rounds: two workers beside twice the one of the same minute."""
    each = [pair / (2 * single) for single, pair in zip(one, two, strict=True)]
    return {
        "samples_per_s": {"1 worker": spread(one), "2 workers": spread(two)},
        "efficiency": spread(each),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        bench.dtp(1)
        found = interleaved(
            {
                "dtp 1": lambda: bench.dtp(1),
                "dtp 2": lambda: bench.dtp(2),
                "torchrun 1": lambda: bench.torchrun(1),
                "torchrun 2": lambda: bench.torchrun(2),
            },
            ROUNDS,
        )
        leave(bench.home)
    save(
        "efficiency",
        {
            "dtp": figures(found["dtp 1"], found["dtp 2"]),
            "torchrun": figures(found["torchrun 1"], found["torchrun 2"]),
        },
    )
