"""`python -m benchmarks [name …]`: run all, or the named ones."""

from __future__ import annotations

import importlib
import sys

NAMES = ("commands", "launch", "recovery", "overhead", "checkpoint")


def main() -> None:
    chosen = sys.argv[1:] or NAMES
    for name in chosen:
        if name not in NAMES:
            sys.exit(f'no benchmark "{name}"; there are: {", ".join(NAMES)}')
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
