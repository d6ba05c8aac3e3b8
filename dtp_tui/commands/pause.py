"""`dtp pause JOB`: checkpoint, leave the machines, keep the job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtp_tui.commands.options import JobArgument, JsonOption

if TYPE_CHECKING:
    from dtp_engine.jobs import Job


def command(job: JobArgument, *, json_lines: JsonOption = False) -> None:
    """Pause a job: checkpoint, free its machines, keep it for later.

    Returns once the request is accepted; `dtp wait JOB --until PAUSED` waits for the checkpoint.
    """
    from dtp_tui.requests import send

    send(lambda engine: engine.pause(job), json_lines=json_lines, then=how_to_go_on)


def how_to_go_on(job: Job) -> str:
    """Nothing for a job that ended before the request reached it."""
    from dtp_engine.jobs import Intent

    pausing = job.intent is Intent.PAUSE and not job.state.final
    return f"go on later: dtp resume {job.name}" if pausing else ""
