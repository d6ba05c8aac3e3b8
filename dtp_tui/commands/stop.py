"""`dtp stop JOB`: a last checkpoint, then the end."""

from __future__ import annotations

from dtp_tui.commands.options import JobArgument, JsonOption


def command(job: JobArgument, *, json_lines: JsonOption = False) -> None:
    """Stop a job for good, after a last checkpoint.

    It ends CANCELLED. To go on later, pause it instead. To end one that does not listen, kill it.
    """
    from dtp_tui.requests import send

    send(
        lambda engine: engine.stop(job),
        json_lines=json_lines,
    )
