"""`dtp tui`: the dashboard."""

from __future__ import annotations

from typing import Annotated

import typer

from dtp_tui.commands.options import complete_job


def command(
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="[JOB]",
            help="Open on this job.",
            autocompletion=complete_job,
            show_default=False,
        ),
    ] = None,
    *,
    demo: Annotated[
        bool, typer.Option("--demo", help="Watch a simulated cluster; nothing is started.")
    ] = False,
) -> None:
    """Open the dashboard; the same as `dtp-tui`."""
    from dtp_tui.app import main

    main([*(["--demo"] if demo else []), *([job] if job else [])])
