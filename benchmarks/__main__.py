"""`python -m benchmarks [name …] [--kills N]`: run all, or the named ones."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

NAMES = (
    "commands",
    "launch",
    "recovery",
    "scale",
    "overhead",
    "efficiency",
    "gpu",
    "checkpoint",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    parser.add_argument("--kills", type=int, help="of each kind, in recovery")
    given = parser.parse_args()
    if given.kills:
        os.environ["BENCH_KILLS"] = str(given.kills)
    for name in given.names or NAMES:
        if name not in NAMES:
            sys.exit(f'no benchmark "{name}"; there are: {", ".join(NAMES)}')
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
