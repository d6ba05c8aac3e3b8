"""The `dtp` program: which commands there are, and what every one of them shares.

Only the command that was asked for is imported; `--version` needs nothing at all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

from dtp_tui.streams import open_closed_streams

if TYPE_CHECKING:
    import typer

JOBS, LOOK, HERE = "Jobs", "What they do", "This machine"
COMMANDS: Mapping[str, str] = {
    "run": JOBS,
    "pause": JOBS,
    "resume": JOBS,
    "scale": JOBS,
    "stop": JOBS,
    "kill": JOBS,
    "wait": JOBS,
    "ps": LOOK,
    "show": LOOK,
    "logs": LOOK,
    "events": LOOK,
    "metrics": LOOK,
    "profile": LOOK,
    "ckpt": LOOK,
    "tui": LOOK,
    "doctor": HERE,
    "controller": HERE,
    "config": HERE,
    "spec": HERE,
}
"""Name → heading in `dtp --help`. The module is `dtp_tui.commands.<name>`, which holds a function
`command`, or a group `app`."""

_COMPLETING = "_DTP_COMPLETE"


def main() -> NoReturn:
    """Entry point of the console script `dtp`."""
    open_closed_streams()
    words = sys.argv[1:]
    if words[:1] in (["--version"], ["-V"]):
        from dtp_tui import __version__  # noqa: PLC0415 - the fast path

        sys.stdout.write(f"dtp {__version__}\n")
        sys.exit(0)
    sys.exit(_guarded(words))


def _guarded(words: list[str]) -> int:
    """Every error is one line; the traceback of one that is ours goes to a file."""
    from dtp_engine.errors import DtpError  # noqa: PLC0415
    from dtp_tui import output  # noqa: PLC0415

    output.prepare_streams()
    try:
        code = _run(words)
        output.flush()
    except DtpError as error:
        output.fail(str(error), error.exit_code)
    except output.ReaderGone:
        output.leave_quietly()
    except KeyboardInterrupt:
        return output.Exit.DETACHED
    except Exception as error:  # noqa: BLE001 - no traceback may reach a user
        from dtp_tui.crash import report  # noqa: PLC0415

        output.fail(report(error, words), output.Exit.INFRASTRUCTURE)
    return code


def _run(words: list[str]) -> int:
    """The exit code; typer says it by leaving."""
    try:
        program(_wanted(words))(prog_name="dtp")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _wanted(words: list[str]) -> Iterable[str]:
    """The one command on the line; all of them for help, mistakes and completing names."""
    if _COMPLETING in os.environ:
        words = os.environ.get("COMP_WORDS", "").split()[1:]
        return [words[0]] if len(words) > 1 and words[0] in COMMANDS else COMMANDS
    return [words[0]] if words and words[0] in COMMANDS else COMMANDS


def program(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """A typer program of these commands."""
    from dtp_tui.program import build  # noqa: PLC0415 - not for --version

    return build(COMMANDS, names)
