"""`dtp events`: what happened, when, and who asked for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from dtp_tui.commands.options import FollowOption, JsonOption, OptionalJobArgument

if TYPE_CHECKING:
    from dtp_engine.engine import Engine
    from dtp_engine.jobs import Event
    from dtp_tui.output import Output


def command(
    job: OptionalJobArgument = None,
    *,
    follow: FollowOption = False,
    json_lines: JsonOption = False,
) -> None:
    """Show the timeline: what happened, when, who asked.

    Of one job, or of all.
    """
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output

    async def show(engine: Engine) -> None:
        out = Output(json_lines=json_lines, live=follow)
        job_id = (await engine.find(job)).id if job else None
        after = 0
        async for event in all_events(engine, job_id):
            print_event(out, event, of_all=job_id is None)
            after = event.seq
        if follow:
            async for event in engine.follow_events(after=after, job_id=job_id):
                print_event(out, event, of_all=job_id is None)

    with_engine(show)


async def all_events(engine: Engine, job_id: str | None) -> AsyncIterator[Event]:
    """Oldest first; the engine gives them in portions."""
    after = 0
    while events := await engine.events(after=after, job_id=job_id):
        for event in events:
            yield event
        after = events[-1].seq


def print_event(out: Output, event: Event, *, of_all: bool) -> None:
    from dtp_tui.records import event_record

    if out.json_lines:
        out.emit(event_record(event))
    else:
        out.say(f"{event.job_id}  {event_line(out, event)}" if of_all else event_line(out, event))


def event_line(out: Output, event: Event) -> str:
    """Time, actor and text."""
    from dtp_tui.cleaning import harmless
    from dtp_tui.labels import Tone, moment

    actor = out.paint(f"{event.actor:<12}", Tone.QUIET)
    return f"{moment(event.at)}  {actor}  {harmless(event.text)}"
