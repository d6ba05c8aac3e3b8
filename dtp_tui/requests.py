"""A command that asks something of one job: send the request, say what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from dtp_engine.engine import Engine
from dtp_engine.jobs import Job
from dtp_tui import labels, records
from dtp_tui.client import with_engine
from dtp_tui.output import Output


def send(
    request: Callable[[Engine], Awaitable[Job]],
    *,
    json_lines: bool,
    then: Callable[[Job], str] = lambda _: "",
) -> None:
    """Returns once the controller has accepted; a refusal is raised as `Refused`.

    `then` gives a line about what to type next, or "" for none.
    """

    async def sent(engine: Engine) -> None:
        job = await request(engine)
        view = await engine.job(job.id)
        out = Output(json_lines=json_lines)
        if json_lines:
            out.emit(records.job_record(view))
            return
        out.say(f"{job.name} ({job.id}): {out.label(labels.headline(view.job, view.gang))}")
        if problem := view.grace_problem:
            out.say(f"  {problem}")
        if line := then(view.job):
            out.hint(line)

    with_engine(sent)
