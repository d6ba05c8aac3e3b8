"""Engine: the only door for both faces. Clients write requests and read; the controller acts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Self, TypeVar

from dtp_engine import checkpoints
from dtp_engine.backend import Backend, Capacity, LogLine
from dtp_engine.backends import Parts, keep_secrets, open_parts
from dtp_engine.clock import Clock, RealClock
from dtp_engine.driver import Driver, driver_of, start_controller, stop_controller
from dtp_engine.errors import InfrastructureError, Refused, UnknownJob
from dtp_engine.jobs import (
    Attempt,
    Event,
    Intent,
    Job,
    JobSpec,
    JobState,
    Request,
    RequestKind,
)
from dtp_engine.ledger import Ledger
from dtp_engine.logs import Tail
from dtp_engine.room import check_fits_ever
from dtp_engine.series import MetricHistory
from dtp_engine.settings import Settings
from dtp_engine.views import JobStorages, JobView
from dtp_trainer import wire
from dtp_trainer.history import Past
from dtp_trainer.history import read as read_past
from dtp_trainer.storage import StorageError

T = TypeVar("T")

POLL_S = 0.05
"""How often a waiting client looks whether the ledger moved."""
ANSWER_WITHIN_S = 10.0
"""A controller that starts cold answers in about one second; one that must first wait until the
lease of a frozen one is over, so long after that."""


class Engine:
    """Open with `Engine.open`; an async context manager.

    Each method that asks for something returns once the controller answered. Errors: `Refused` with
    the controller's reason, `UnknownJob`, `InfrastructureError` when nobody answers.
    """

    def __init__(self, settings: Settings, parts: Parts, clock: Clock) -> None:
        self.settings = settings
        self._ledger: Ledger = parts.ledger
        self._backend: Backend = parts.backend
        self._clock = clock
        self.storages = JobStorages(settings)
        self._started_at = -ANSWER_WITHIN_S

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        return cls(settings, await open_parts(settings), RealClock())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_ended: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._backend.aclose()
        await self._ledger.aclose()
        self.storages.close()

    # ------------------------------------------------------------------------- what a client asks

    async def check(self, spec: JobSpec) -> Capacity:
        """Raises `UsageError` for a job that could never be placed here; what there is."""
        capacity = await self._backend.capacity()
        check_fits_ever(spec, capacity)
        return capacity

    async def submit(self, spec: JobSpec, *, key: str | None = None) -> Job:
        """Record the job as QUEUED and see that somebody drives. The same key twice is one job.

        Raises `UsageError` for a job that could never be placed here, and for secrets that are not
        in the environment.
        """
        await self.check(spec)
        await self.ensure_driver()  # it starts while the job is recorded
        key = key or secrets.token_hex(16)
        home, actor, now = self.settings.home, self.settings.actor, self._clock.now()
        job = _new_job(spec, key, actor, now)
        await self.storages.run(lambda: keep_secrets(home, job.id, spec, os.environ))
        request = Request(key, RequestKind.SUBMIT, job.id, actor, now)
        stored = await self._ledger.request(request, job=job)
        await self.ensure_driver()
        return await self._read(stored.job_id)

    async def pause(self, ref: str) -> Job:
        return await self._ask(RequestKind.PAUSE, ref)

    async def resume(self, ref: str, *, from_step: int | None = None) -> Job:
        """From the newest good checkpoint, or from the one of `from_step`."""
        if from_step is not None:
            job = await self.find(ref)
            await self.storages.of(job.id, lambda s: checkpoints.find(s, str(from_step)))
        return await self._ask(RequestKind.RESUME, ref, from_step=from_step)

    async def scale(self, ref: str, workers: int) -> Job:
        return await self._ask(RequestKind.SCALE, ref, workers=workers)

    async def stop(self, ref: str) -> Job:
        """Checkpoint, then cancel."""
        return await self._ask(RequestKind.STOP, ref)

    async def kill(self, ref: str) -> Job:
        """Cancel at once; steps since the last checkpoint are lost."""
        return await self._ask(RequestKind.KILL, ref)

    async def pin(self, job_id: str, name_or_step: str, *, pinned: bool) -> wire.CheckpointEntry:
        return await self.storages.of(
            job_id, lambda storage: checkpoints.pin(storage, name_or_step, pinned=pinned)
        )

    # ------------------------------------------------------------------------- what a client reads

    async def find(self, ref: str) -> Job:
        """By id, by name (the active job of that name, else the newest), or by unique id prefix."""
        job = choose_job(await self._ledger.jobs(), ref)
        await self._revive([job])
        return job

    async def jobs(self) -> Sequence[JobView]:
        """Oldest first."""
        jobs = await self._ledger.jobs()
        await self._revive(jobs)
        return await self.storages.views(jobs)

    async def job(self, job_id: str) -> JobView:
        return (await self.storages.views([await self._read(job_id)]))[0]

    async def attempts(self, job_id: str) -> Sequence[Attempt]:
        return await self._ledger.attempts([job_id])

    async def events(
        self, *, after: int = 0, job_id: str | None = None, limit: int = 1000
    ) -> Sequence[Event]:
        """With a number greater than `after`, oldest first, at most `limit`."""
        return await self._ledger.events(after=after, job_id=job_id, limit=limit)

    async def follow_events(
        self, *, after: int = 0, job_id: str | None = None
    ) -> AsyncIterator[Event]:
        """Never ends by itself."""
        revision = -1
        while True:
            revision = await _moved(self._ledger, self._clock, revision)
            while found := await self.events(after=after, job_id=job_id):
                for event in found:
                    after = event.seq
                    yield event

    async def watch(self, job_id: str, *, interval_s: float = 0.25) -> AsyncIterator[JobView]:
        """A view at once, then one whenever it changed; the last one is final or PAUSED.

        Sees to it that somebody drives for as long as the job is active.
        """
        seen: JobView | None = None
        while True:
            view = await self.job(job_id)
            if view != seen:
                seen = view
                yield view
            if not view.job.active:
                return
            await self.ensure_driver()
            await self._clock.sleep(interval_s)

    async def wait(
        self, job_id: str, *, until: Sequence[JobState] = (), timeout_s: float | None = None
    ) -> Job:
        """Until the job is in one of these states, or (always) no longer active. `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            async for view in self.watch(job_id, interval_s=POLL_S):
                if view.job.state in until:
                    return view.job
        return await self._read(job_id)

    async def logs(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        follow: bool = False,
        since: float | None = None,
    ) -> AsyncIterator[tuple[int, LogLine]]:
        """(attempt, line) of all attempts or of one, records and text, oldest attempt first.

        With `since` (Unix time) from about then on, and what the last attempts said just before.
        With `follow` it goes on through new attempts and ends when the job is no longer active.
        """
        tail = Tail(self._backend, attempt=attempt, since=since)
        while True:
            active = (await self._read(job_id)).active
            async for told in tail.new_lines(await self.attempts(job_id)):
                yield told
            if not (follow and active):
                return
            await self._clock.sleep(2 * POLL_S)

    async def metrics(self, job_id: str) -> MetricHistory:
        """From the job's storage what is there, from the logs what came later."""
        history, past = MetricHistory(), await self.past(job_id)
        for told in past.told:
            history.add(told.attempt, told.record)
        async for attempt, line in self.logs(job_id, since=past.since):
            if line.record is not None and not past.holds(line.record):
                history.add(attempt, line.record)
        return history

    async def past(self, job_id: str) -> Past:
        """Empty where the storage cannot tell: the logs hold it all, in more time."""
        try:
            return await self.storages.of(job_id, read_past)
        except StorageError:
            return Past()

    async def checkpoints(self, job_id: str) -> Sequence[wire.CheckpointEntry]:
        """Oldest first."""
        return await self.storages.of(job_id, checkpoints.entries)

    async def capacity(self) -> Capacity:
        return await self._backend.capacity()

    # ------------------------------------------------------------------------------- who drives

    async def driver(self) -> Driver:
        return driver_of(await self._ledger.lease(), self.settings, self._clock.now())

    async def ensure_driver(self) -> None:
        """Start the background controller unless one is alive, or was started a moment ago."""
        if (await self.driver()).alive or time.monotonic() - self._started_at < 5:
            return
        start_controller(self.settings)
        self._started_at = time.monotonic()

    async def _revive(self, jobs: Sequence[Job]) -> None:
        """Whoever looks at a job that should be going on sees to it that somebody drives."""
        if any(job.active for job in jobs):
            await self.ensure_driver()

    async def stop_driver(self) -> bool:
        """False when there was none. Jobs train on without it."""
        return stop_controller(await self.driver())

    # ---------------------------------------------------------------------------------- inside

    async def _ask(
        self,
        kind: RequestKind,
        ref: str,
        *,
        workers: int | None = None,
        from_step: int | None = None,
    ) -> Job:
        job = await self.find(ref)
        key, actor, now = secrets.token_hex(16), self.settings.actor, self._clock.now()
        await self._ledger.request(Request(key, kind, job.id, actor, now, workers, from_step))
        answered = await self._answer(key)
        if answered.refusal is not None:
            raise Refused(answered.refusal)
        return await self._read(job.id)

    async def _answer(self, key: str) -> Request:
        revision, within_s = -1, ANSWER_WITHIN_S + self.settings.lease_ttl_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while True:
                    await self.ensure_driver()
                    revision = await _moved(self._ledger, self._clock, revision, give_up_s=5)
                    request = await self._ledger.read_request(key)
                    if request is not None and request.answered_at is not None:
                        return request
        raise InfrastructureError(
            f"the request is recorded, but no controller answered in {within_s:g} s; "
            f"see {(await self.driver()).log}, or run one here: dtp controller run"
        )

    async def _read(self, job_id: str) -> Job:
        job = await self._ledger.job(job_id)
        if job is None:
            raise UnknownJob(f"no job {job_id}; `dtp ps` lists them")
        return job


def _new_job(spec: JobSpec, key: str, actor: str, now: datetime) -> Job:
    return Job(
        id=job_id_of(key),
        name=spec.name,
        spec=spec,
        state=JobState.QUEUED,
        intent=Intent.RUN,
        workers=spec.nodes.max,
        created_at=now,
        created_by=actor,
    )


async def _moved(
    ledger: Ledger, clock: Clock, revision: int, *, give_up_s: float = float("inf")
) -> int:
    """The ledger's revision once it differs from `revision`, or when so long has passed."""
    deadline = clock.monotonic() + give_up_s
    while (now := await ledger.revision()) == revision and clock.monotonic() < deadline:
        await clock.sleep(POLL_S)
    return now


def job_id_of(key: str) -> str:
    """Eight characters, the first a letter, the same for the same idempotency key.

    >>> job_id_of("nightly-2026-11-23") == job_id_of("nightly-2026-11-23")
    True
    """
    text = base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().lower()
    return next(text[i : i + 8] for i in range(len(text)) if text[i].isalpha())


def choose_job(jobs: Sequence[Job], ref: str) -> Job:
    """The job that `ref` names. Raises `UnknownJob` that says what to type instead."""
    named = [job for job in jobs if job.name == ref]
    active = [job for job in named if not job.state.final]
    if len(active) > 1:
        ids = ", ".join(job.id for job in active)
        raise UnknownJob(f'{len(active)} jobs named "{ref}" are alive; name one by its id: {ids}')
    if named:
        return (active or named)[-1]
    found = [job for job in jobs if job.id.startswith(ref)] if ref else []
    exact = [job for job in found if job.id == ref]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if found:
        ids = ", ".join(job.id for job in found)
        raise UnknownJob(f'"{ref}" is the beginning of several ids: {ids}')
    raise UnknownJob(f'no job "{ref}"; `dtp ps` lists them')
