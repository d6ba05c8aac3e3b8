"""`dtp resume JOB`: go on from the newest good checkpoint, or from another."""

from __future__ import annotations

from typing import Annotated

import typer

from dtp_tui.commands.options import JobArgument, JsonOption


def command(
    job: JobArgument,
    *,
    from_step: Annotated[
        int | None,
        typer.Option(
            "--from",
            metavar="STEP",
            min=0,
            help="Go on from the checkpoint of this step instead of the newest good one.",
            show_default=False,
        ),
    ] = None,
    json_lines: JsonOption = False,
) -> None:
    """Resume a paused job from its newest good checkpoint.

    Follow it with `dtp logs -f JOB` or `dtp-tui`; `dtp ckpt ls JOB` lists the checkpoints.
    """
    from dtp_tui.requests import send

    send(
        lambda engine: engine.resume(job, from_step=from_step),
        json_lines=json_lines,
        then=lambda found: f"follow it: dtp logs -f {found.name}",
    )
