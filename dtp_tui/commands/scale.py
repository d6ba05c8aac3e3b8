"""`dtp scale JOB N`: more or fewer workers, while it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from dtp_tui.commands.options import JobArgument, JsonOption


def command(
    job: JobArgument,
    workers: Annotated[
        int,
        typer.Argument(metavar="N", min=1, help="Workers wished, within the job's `nodes`."),
    ],
    *,
    json_lines: JsonOption = False,
) -> None:
    """Scale a job to N workers, while it runs.

    It checkpoints at a step and goes on with N workers, so that no step is lost. A paused or
    waiting job remembers N for when it runs.
    """
    from dtp_tui.requests import send

    send(
        lambda engine: engine.scale(job, workers),
        json_lines=json_lines,
    )
