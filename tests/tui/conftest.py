"""An engine in memory that answers what a test put into it, and an app that looks at it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from textual.app import App
from textual.pilot import Pilot

from dtp_engine.backend import Capacity, LogLine, Machine
from dtp_engine.driver import Driver
from dtp_engine.engine import choose_job
from dtp_engine.errors import DtpError, Refused
from dtp_engine.jobs import (
    Attempt,
    Event,
    Intent,
    Job,
    JobSpec,
    JobState,
    NodeRange,
    Placement,
    PlacementState,
    Resources,
)
from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_trainer.history import Past
from dtp_tui.dashboard import DtpApp, Source

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
NOW = START + timedelta(minutes=10)
UP_TO_FOUR = NodeRange(1, 4)


class FakeEngine:
    """What of `Engine` the dashboard uses. `asked` holds what it was asked to change."""

    def __init__(self, *views: JobView) -> None:
        self.views = list(views)
        self.asked: list[tuple[str, str, int | None]] = []
        self.saved: dict[str, list[wire.CheckpointEntry]] = {}
        self.timeline: list[Event] = []
        self.lines: dict[str, list[tuple[int, LogLine]]] = {}
        self.broken: DtpError | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.refuses: str | None = None
        self.closed = False

    async def jobs(self) -> Sequence[JobView]:
        await self.answers.wait()
        if self.broken is not None:
            raise self.broken
        return list(self.views)

    async def job(self, job_id: str) -> JobView:
        return next(view for view in self.views if view.job.id == job_id)

    async def find(self, ref: str) -> Job:
        return choose_job([view.job for view in self.views], ref)

    async def attempts(self, job_id: str) -> Sequence[Attempt]:
        view = await self.job(job_id)
        members = view.gang.members if view.gang else ()
        placed = tuple(Placement(m.worker, PlacementState.LAUNCHED, START) for m in members)
        return [Attempt(job_id, 1, START, "secret", placed, running_at=START)]

    async def events(self, *, after: int = 0, job_id: str | None = None) -> Sequence[Event]:
        return [e for e in self.timeline if e.seq > after and job_id in (None, e.job_id)]

    async def past(self, job_id: str) -> Past:
        return Past()

    async def logs(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        follow: bool = False,
        since: float | None = None,
    ) -> AsyncIterator[tuple[int, LogLine]]:
        seen = 0
        while True:
            lines = self.lines.get(job_id, [])
            for line in lines[seen:]:
                yield line
            seen = len(lines)
            if not (follow and (await self.job(job_id)).job.active):
                return
            await asyncio.sleep(0.05)

    async def checkpoints(self, job_id: str) -> Sequence[wire.CheckpointEntry]:
        return self.saved.get(job_id, [])

    async def capacity(self) -> Capacity:
        machine = Machine("here", 16, 64 << 30, 8)
        return Capacity(NOW, (machine,), 10, 32 << 30, 6, Resources(8, 16))

    async def driver(self) -> Driver:
        return Driver("host:1:1.0", alive=True, beat_at=NOW, log=Path("controller.log"))

    async def ensure_driver(self) -> None:
        pass

    async def aclose(self) -> None:
        self.closed = True

    async def pause(self, ref: str) -> Job:
        return await self._ask("pause", ref, None, intent=Intent.PAUSE)

    async def stop(self, ref: str) -> Job:
        return await self._ask("stop", ref, None, intent=Intent.CANCEL)

    async def scale(self, ref: str, workers: int) -> Job:
        return await self._ask("scale", ref, workers, workers=workers)

    async def resume(self, ref: str, *, from_step: int | None = None) -> Job:
        return await self._ask("resume", ref, from_step, intent=Intent.RUN, state=JobState.QUEUED)

    async def _ask(self, verb: str, ref: str, number: int | None, **changes: object) -> Job:
        if self.refuses is not None:
            raise Refused(self.refuses)
        self.asked.append((verb, ref, number))
        view = await self.job(ref)
        changed = replace(view, job=replace(view.job, **changes))
        self.views[self.views.index(view)] = changed
        return changed.job

    # ------------------------------------------------------------------------ for the tests

    def say(self, job_id: str, *texts: str, source: str = "rank0", at: float | None = None) -> None:
        """The job's log grows by these lines."""
        for text in texts:
            when = at if at is not None else NOW.timestamp()
            line = wire.Text(when, source, "out", text)
            self.lines.setdefault(job_id, []).append((1, LogLine(0, "", line, None)))

    def measure(self, job_id: str, *records: wire.Record) -> None:
        for record in records:
            self.lines.setdefault(job_id, []).append((1, LogLine(0, "", None, record)))

    def happen(self, job_id: str, name: str, text: str, actor: str = "controller") -> None:
        seq = len(self.timeline) + 1
        self.timeline.append(Event(seq, NOW, job_id, 1, actor, name, text))


def job_view(
    name: str = "digits",
    state: JobState = JobState.RUNNING,
    *,
    workers: int = 2,
    nodes: NodeRange = UP_TO_FOUR,
    step: int | None = 1200,
    saved_at_step: int | None = 1000,
    **changes: object,
) -> JobView:
    """A job as an engine would show it; its id is its name's first eight letters."""
    job_id = f"{name.replace('-', '')}xxxxxxxx"[:8]
    intent = Intent.PAUSE if state is JobState.PAUSED else Intent.RUN
    spec = JobSpec(name, "python train.py", nodes=nodes)
    job = Job(job_id, name, spec, state, intent, workers, START, "ana@laptop", attempt=1)
    job = replace(job, **{"started_at": START + timedelta(seconds=5), **changes})
    gang = gang_of(workers, step) if state in (JobState.RUNNING, JobState.STOPPING) else None
    entry = None if saved_at_step is None else checkpoint(saved_at_step)
    return JobView(job, gang, entry)


def gang_of(workers: int, step: int | None, **changes: object) -> wire.Gang:
    members = tuple(
        wire.Member(n, f"10.0.0.{n}", 1, n, leaving=False, cpu_percent=95.0, memory_bytes=1 << 30)
        for n in range(workers)
    )
    gang = wire.Gang(
        1, 1, 0, "10.0.0.0:5000", "running", 1, NOW.timestamp(), members, workers, step, 5000
    )
    trend = (8000.0, 8100.0, 8200.0, 8050.0)
    return replace(gang, samples_per_s=8200.0, trend=trend, epoch=1.5, **changes)


def checkpoint(step: int, **changes: object) -> wire.CheckpointEntry:
    name = wire.checkpoint_name(step, 1)
    at = (NOW - timedelta(seconds=30)).timestamp()
    entry = wire.CheckpointEntry(name, step, 1, 1, 2, at, 5 << 20, {"loss": 0.25})
    return replace(entry, **changes)


def window(at: float, step: int, **values: float) -> wire.Window:
    phases = {
        "step": {"min": 0.01, "median": 0.012, "max": 0.02},
        "data": {"min": 0.001, "median": 0.002, "max": 0.004},
    }
    return wire.Window(at, 1, 0, 0, 2, step, 80, 1.5, 5000, values, 8200.0, None, phases)


@pytest.fixture
def given() -> SimpleNamespace:
    """What a test makes its jobs of."""
    return SimpleNamespace(
        now=NOW,
        engine=FakeEngine,
        job_view=job_view,
        gang_of=gang_of,
        checkpoint=checkpoint,
        window=window,
    )


@pytest.fixture
def engine() -> FakeEngine:
    """One job that runs, one that is paused, one that failed."""
    return FakeEngine(
        job_view("digits"),
        job_view("kjv-language", JobState.PAUSED),
        job_view("broken", JobState.FAILED, step=None, saved_at_step=None),
    )


async def _until(pilot: Pilot[None], holds: Callable[[], bool], within_s: float = 20.0) -> None:
    """Let the app run until something holds; fail with what is on the screen otherwise."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail("this never came to be:\n" + screen_text(pilot.app))
        await pilot.pause(0.02)


def screen_text(app: App[None]) -> str:
    """What a reader sees, line by line."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    return _until


@pytest.fixture
def seen() -> Callable[[App[None]], str]:
    return screen_text


@pytest.fixture
def app_of() -> Callable[..., DtpApp]:
    """An app that looks at an engine."""

    def make(
        engine: FakeEngine, job: str | None = None, now: Callable[[], datetime] = lambda: NOW
    ) -> DtpApp:
        async def opened() -> FakeEngine:
            return engine

        return DtpApp(Source("local", opened, now, tick_s=0.05), job=job)

    return make
