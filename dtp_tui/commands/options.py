"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer


def complete_job(incomplete: str) -> list[tuple[str, str]]:
    """Names of jobs for the shell, newest first; nothing when the state cannot be read."""
    from dtp_engine.errors import DtpError
    from dtp_engine.settings import load_settings

    try:
        if not load_settings().home.is_dir():
            return []
        return _jobs_beginning_with(incomplete)
    except (DtpError, OSError):
        return []


def _jobs_beginning_with(incomplete: str) -> list[tuple[str, str]]:
    from dtp_tui.client import with_engine
    from dtp_tui.labels import STATES

    jobs = [view.job for view in reversed(with_engine(lambda engine: engine.jobs()))]
    found = {j.name: STATES[j.state].word for j in reversed(jobs) if j.name.startswith(incomplete)}
    by_id = {j.id: j.name for j in jobs if incomplete and j.id.startswith(incomplete)}
    return [*reversed(found.items()), *by_id.items()]


JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="Its name, or the beginning of its id.",
        autocompletion=complete_job,
        show_default=False,
    ),
]
OptionalJobArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[JOB]",
        help="Only of this job: its name, or the beginning of its id.",
        autocompletion=complete_job,
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object a line on stdout; words on stderr.")
]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on as it happens.")]
