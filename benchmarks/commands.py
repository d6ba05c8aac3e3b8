"""How long the commands take that a person waits for, beside the bare interpreter and torchrun's
own --help."""

from __future__ import annotations

import sys
import tempfile
from functools import partial

from benchmarks.measure import BIN, interleaved, save, spread, wall_s

ROUNDS = 11


def main() -> None:
    dtp = str(BIN / "dtp")
    with tempfile.TemporaryDirectory() as home:
        env = {"DTP_HOME": home}
        found = interleaved(
            {
                "python -c pass": partial(wall_s, [sys.executable, "-c", "pass"]),
                "dtp --version": partial(wall_s, [dtp, "--version"], env),
                "dtp --help": partial(wall_s, [dtp, "--help"], env),
                "dtp ps --json": partial(wall_s, [dtp, "ps", "--json"], env),
            },
            ROUNDS,
        )
    found["torchrun --help"] = [wall_s([str(BIN / "torchrun"), "--help"]) for _ in range(3)]
    goals = {"dtp --version": 0.12, "dtp --help": 0.2, "dtp ps --json": 0.35}
    save("commands", {"seconds": {k: spread(v) for k, v in found.items()}, "goals_s": goals})
