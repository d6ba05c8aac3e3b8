"""`dtp pause JOB`: checkpoint, leave the machines, keep the job."""

from __future__ import annotations

from dtp_tui.commands.options import JobArgument, JsonOption


def command(job: JobArgument, *, json_lines: JsonOption = False) -> None:
    """Pause a job: checkpoint, free its machines, keep it for later.

    Returns once the request is accepted; `dtp wait JOB --until PAUSED` waits for the checkpoint.
    """
    from dtp_tui.requests import send

    send(
        lambda engine: engine.pause(job),
        json_lines=json_lines,
        then=lambda found: f"go on later: dtp resume {found.name}",
    )
