"""A Python program under the eyes of a debugger: ``python -m dtp_trainer.ranks.debugging COMMAND…``

`breakpoint()` stops there; an exception that nobody caught, and Ctrl-C, end in
`pdb` at the place where it happened instead of in a traceback alone.
"""

from __future__ import annotations

import os
import pdb
import sys
from types import TracebackType

from dtp_trainer.ranks import program


class _Debugger(pdb.Pdb):
    """Whose ``q`` ends the program like any other exit, not with an error to examine."""

    def set_quit(self) -> None:
        super().set_quit()
        sys.exit(1)


def main() -> int:
    """The exit code of the program."""
    command = sys.argv[1:]
    found = program.parse(command)
    if found is None:
        sys.stderr.write(f"dtp: not a Python program: {' '.join(command)}\n")
        return 2
    path = (*program.search_path(found, os.environ), *sys.path)
    program.prepare(found, command, tuple(dict.fromkeys(path)))
    sys.breakpointhook = _stop_here
    ending = program.run(found, examine=_examine)
    return ending.code if ending.code >= 0 else 128 - ending.code


def _stop_here(*_args: object, **_options: object) -> None:
    _Debugger().set_trace(sys._getframe().f_back)  # noqa: SLF001 - as `pdb.set_trace` does


def _examine(trace: TracebackType) -> None:
    sys.stderr.write("dtp: it failed here; l lists, p EXPRESSION prints, u goes up, q leaves\n")
    pdb.post_mortem(trace)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
