"""Asks the engine twice a second and tells the app: the one place where the dashboard reads.

Whatever the engine cannot answer becomes a `problem` in the picture, and the picture keeps what was
seen before; nothing that goes wrong here ends the app.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from textual.message import Message

from dtp_engine.engine import Engine
from dtp_engine.errors import DtpError
from dtp_engine.jobs import Attempt, Event
from dtp_engine.series import MetricHistory
from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_tui.messages import ClusterPicture, ClusterPolled, JobPicture, JobPolled, LinesArrived
from dtp_tui.widgets.log_buffer import CAPACITY, LogEntry, entry

TICK_S = 0.5
SLOW_TICKS = 6
"""Capacity and checkpoints are asked for once in so many ticks."""
PATIENCE_S = 1.0
_BREATH = 200
"""After so many lines the event loop gets a turn."""

Now = Callable[[], datetime]
Post = Callable[[Message], object]


def wall_clock() -> datetime:
    return datetime.now(UTC)


class Feed:
    """`run` until cancelled; `open` chooses the job whose details, lines and metrics are told."""

    def __init__(
        self, engine: Engine, post: Post, *, now: Now = wall_clock, tick_s: float = TICK_S
    ) -> None:
        self._engine = engine
        self._post = post
        self._now = now
        self._tick_s = tick_s
        self._ticks = 0
        self._picture = ClusterPicture(now(), now())
        self._job: JobFeed | None = None
        self._hurry = asyncio.Event()

    async def run(self) -> None:
        try:
            while True:
                await self._look_patiently()
                self._ticks += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), self._tick_s)
                self._hurry.clear()
        finally:
            self.open(None)

    def open(self, job_id: str | None) -> None:
        """Tell about this job from now on; about none with None."""
        if self._job is not None:
            if self._job.job_id == job_id:
                return
            self._job.close()
        self._job = JobFeed(self._engine, self._post, job_id) if job_id else None
        self.hurry()

    def hurry(self) -> None:
        """Look now, not at the next tick."""
        self._hurry.set()

    async def _look_patiently(self) -> None:
        """While the engine does not answer, the age of what was seen goes on being told."""
        look = asyncio.create_task(self._look())
        try:
            while not look.done():
                await asyncio.wait({look}, timeout=PATIENCE_S)
                if not look.done():
                    self._post(ClusterPolled(replace(self._picture, now=self._now())))
            await look
        finally:
            look.cancel()

    async def _look(self) -> None:
        try:
            picture = await self._cluster()
            self._picture = picture
            if self._job is not None:
                await self._job.look(picture, is_slow_turn=self._is_slow_turn)
        except DtpError as error:
            picture = replace(self._picture, now=self._now(), problem=str(error))
        except Exception as error:  # noqa: BLE001 - shown as a problem, with the data's age; the app lives on
            picture = replace(self._picture, now=self._now(), problem=f"internal: {error!r}")
        self._post(ClusterPolled(picture))

    @property
    def _is_slow_turn(self) -> bool:
        return self._ticks % SLOW_TICKS == 0

    async def _cluster(self) -> ClusterPicture:
        jobs = tuple(await self._engine.jobs())
        driver = await self._engine.driver()
        if not driver.alive and any(view.job.active for view in jobs):
            await self._engine.ensure_driver()
        capacity = self._picture.capacity
        if capacity is None or self._is_slow_turn:
            capacity = await self._engine.capacity()
        return ClusterPicture(self._now(), self._now(), jobs, capacity, driver)


class JobFeed:
    """Details, lines and metrics of one job."""

    def __init__(self, engine: Engine, post: Post, job_id: str) -> None:
        self.job_id = job_id
        self._engine = engine
        self._post = post
        self._events: list[Event] = []
        self._checkpoints: tuple[wire.CheckpointEntry, ...] = ()
        self._newest: wire.CheckpointEntry | None = None
        self._tail = LogTail(engine, job_id)

    async def look(self, cluster: ClusterPicture, *, is_slow_turn: bool) -> None:
        view = next((view for view in cluster.jobs if view.job.id == self.job_id), None)
        if view is None:
            return
        self._tail.keep_up(view, may_retry=is_slow_turn)
        await self._read_events()
        if is_slow_turn or view.checkpoint != self._newest:
            self._checkpoints = await self._saved(view)
            self._newest = view.checkpoint
        attempts = tuple(await self._engine.attempts(self.job_id))
        self._tell(cluster, view, attempts)

    def close(self) -> None:
        self._tail.close()

    async def _saved(self, view: JobView) -> tuple[wire.CheckpointEntry, ...]:
        return () if view.checkpoint_problem else tuple(await self._engine.checkpoints(self.job_id))

    def _tell(self, cluster: ClusterPicture, view: JobView, attempts: tuple[Attempt, ...]) -> None:
        history = self._tail.history
        self._post(
            JobPolled(
                JobPicture(
                    cluster.now,
                    view,
                    history,
                    history.revision,
                    attempts,
                    tuple(self._events),
                    self._checkpoints,
                )
            )
        )
        lines, anew = self._tail.take()
        if lines or anew:
            self._post(LinesArrived(self.job_id, lines, anew=anew))

    async def _read_events(self) -> None:
        after = self._events[-1].seq if self._events else 0
        self._events.extend(await self._engine.events(after=after, job_id=self.job_id))


class LogTail:
    """Reads the log of a job in a task of its own, from its beginning and on while it is active."""

    def __init__(self, engine: Engine, job_id: str) -> None:
        self.history = MetricHistory()
        self._engine = engine
        self._job_id = job_id
        self._lines: deque[LogEntry] = deque(maxlen=CAPACITY)
        self._anew = False
        self._task: asyncio.Task[None] | None = None

    def keep_up(self, view: JobView, *, may_retry: bool) -> None:
        """Start reading, and again after a pause or, when `may_retry`, after an error."""
        if self._task is None or (self._task.done() and self._has_more(view, may_retry=may_retry)):
            self.history = MetricHistory()
            self._lines.clear()
            self._anew = True
            self._task = asyncio.create_task(self._read(), name=f"log of {self._job_id}")
        for event in view.gang.events if view.gang else ():
            self.history.add(view.job.attempt, event)

    def take(self) -> tuple[tuple[LogEntry, ...], bool]:
        """Lines since the last call, and whether they are the first of a new reading."""
        taken = tuple(self._lines), self._anew
        self._lines.clear()
        self._anew = False
        return taken

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _has_more(self, view: JobView, *, may_retry: bool) -> bool:
        """Raises what ended the reading until it may be tried again."""
        failed = self._task.exception() if self._task is not None else None
        if failed is not None and not may_retry:
            raise failed
        return view.job.active or failed is not None

    async def _read(self) -> None:
        count = 0
        past = await self._engine.past(self._job_id)
        for told in past.told:
            self.history.add(told.attempt, told.record)
            count += 1
            if count % _BREATH == 0:
                await asyncio.sleep(0)
        logs = self._engine.logs(self._job_id, follow=True, since=past.since)
        async for attempt, line in logs:
            if line.record is not None:
                if not past.holds(line.record):
                    self.history.add(attempt, line.record)
            elif line.text is not None:
                self._lines.append(entry(line.text))
            count += 1
            if count % _BREATH == 0:
                await asyncio.sleep(0)
