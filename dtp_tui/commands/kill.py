"""`dtp kill JOB`: the end, at once."""

from __future__ import annotations

from dtp_tui.commands.options import JobArgument, JsonOption


def command(job: JobArgument, *, json_lines: JsonOption = False) -> None:
    """Kill a job at once, without a last checkpoint.

    It ends CANCELLED; steps since the newest checkpoint are lost.
    """
    from dtp_tui.requests import send

    send(
        lambda engine: engine.kill(job),
        json_lines=json_lines,
    )
