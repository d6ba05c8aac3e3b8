"""``dtp-tui [JOB]``: the door of the dashboard; textual is imported once the arguments are read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtp_engine.errors import DtpError
from dtp_tui import __version__
from dtp_tui.streams import open_closed_streams

if TYPE_CHECKING:
    from dtp_tui.dashboard import Source

FRAMES_OVER_SSH = "10"
"""A second. Keys answer as fast as ever; what a flood of updates may cost the line is bounded."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Ends the process: 0, the exit code of an error, or 128 + signal."""
    open_closed_streams()
    arguments = _parser().parse_args(argv)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _fail("needs a terminal; `dtp ps`, `dtp logs` and `dtp run --headless` do without", 2)
    prepare_terminal()
    try:
        source = _source(arguments)
    except DtpError as error:
        _fail(str(error), error.exit_code)
    sys.exit(_run(source, arguments.job, mouse=not arguments.no_mouse))


def prepare_terminal() -> None:
    """Settings that textual reads once, when it is imported."""
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    if "SSH_CONNECTION" in os.environ:
        os.environ.setdefault("TEXTUAL_FPS", FRAMES_OVER_SSH)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dtp-tui",
        description="Watch and steer training jobs. Leaving it, or losing the line, stops no job.",
    )
    parser.add_argument("job", nargs="?", help="open on this job: its name, or the start of its id")
    parser.add_argument("--demo", action="store_true", help="a simulated cluster; nothing is real")
    parser.add_argument("--home", type=Path, help="where state is kept (DTP_HOME)")
    parser.add_argument("--no-mouse", action="store_true", help="leave the mouse to the terminal")
    parser.add_argument("--version", action="version", version=f"dtp {__version__}")
    return parser


def _source(arguments: argparse.Namespace) -> Source:
    from dtp_engine.engine import Engine  # noqa: PLC0415 - `--help` needs none of it
    from dtp_engine.settings import load_settings  # noqa: PLC0415
    from dtp_tui.dashboard import Source  # noqa: PLC0415

    if arguments.demo:
        from dtp_engine.demo import Demo  # noqa: PLC0415

        demo = Demo()
        return Source("demo", demo.open, demo.clock.now)
    if arguments.home is not None:
        os.environ["DTP_HOME"] = str(arguments.home)
    settings = load_settings()
    return Source(settings.backend, lambda: Engine.open(settings))


def _run(source: Source, job: str | None, *, mouse: bool) -> int:
    from dtp_tui.dashboard import DtpApp  # noqa: PLC0415
    from dtp_tui.lifeline import Lifeline  # noqa: PLC0415

    lifeline = Lifeline(sys.stdin.fileno())
    lifeline.start()
    app = DtpApp(source, job=job, lifeline=lifeline)
    app.run(mouse=mouse)
    return app.return_code or 0


def _fail(message: str, exit_code: int) -> None:
    sys.stderr.write(f"dtp-tui: {message}\n")
    sys.exit(exit_code)
