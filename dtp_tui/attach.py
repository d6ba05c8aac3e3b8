"""Follow one job until it comes to rest, and show all that happens on the way."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeAlias, TypeVar

from dtp_engine.backend import LogLine
from dtp_engine.engine import Engine
from dtp_engine.jobs import Event, Job
from dtp_engine.views import JobView
from dtp_tui.training import Progress

T = TypeVar("T")
TICK_S = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Happening: TypeAlias = JobView | Event | tuple[int, LogLine]
"""The job changed; its timeline grew; (attempt, a line of its log)."""


class Face(Protocol):
    """What shows a job to people or to a program."""

    progress: Progress

    def show(self, happening: Happening) -> None: ...
    def tick(self) -> None:
        """Ten times a second."""
        ...

    def close(self) -> None: ...


class Detached(Exception):
    """A signal told this client to leave; the job goes on."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


async def follow(engine: Engine, job_id: str, face: Face) -> Job:
    """The job once it has ended or is paused, after its last line was shown."""
    seen = _Seen(face)
    try:
        await _until_first_ends(
            _finish(engine, job_id, seen),
            _each(engine.follow_events(job_id=job_id), seen.event),
            _tick(face),
        )
    finally:
        face.close()
    return (await engine.job(job_id)).job


async def _finish(engine: Engine, job_id: str, seen: _Seen) -> None:
    """Ends when the job is at rest and everything of it has been shown."""
    await asyncio.gather(
        _each(engine.watch(job_id), seen.face.show),
        _each(engine.logs(job_id, follow=True), seen.face.show),
    )
    while events := await engine.events(after=seen.last_event, job_id=job_id):
        for event in events:
            seen.event(event)


class _Seen:
    """Which events were shown: two readers may bring the same one at the end."""

    def __init__(self, face: Face) -> None:
        self.face = face
        self.last_event = 0

    def event(self, event: Event) -> None:
        if event.seq > self.last_event:
            self.last_event = event.seq
            self.face.show(event)


async def _each(happenings: AsyncIterator[T], show: Callable[[T], None]) -> None:
    async for happening in happenings:
        show(happening)


async def _tick(face: Face) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        face.tick()


async def _until_first_ends(*work: Coroutine[Any, Any, None]) -> None:
    """Cancels the others; raises what the first one raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_detached(work: Coroutine[Any, Any, T]) -> T:
    """Its result; raises `Detached` when Ctrl-C, SIGTERM or SIGHUP came first."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[int] = loop.create_future()
    for number in SIGNALS:
        loop.add_signal_handler(number, _receive, received, number)
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((task, received), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Detached(received.result())
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def _receive(received: asyncio.Future[int], number: int) -> None:
    if not received.done():
        received.set_result(number)
