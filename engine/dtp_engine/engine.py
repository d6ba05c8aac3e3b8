"""Engine: the only door for both faces. Clients write requests and read; the controller acts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from dtp_engine.backend import Backend, Capacity, LogLine
from dtp_engine.clock import Clock
from dtp_engine.jobs import Attempt, Event, Job, JobSpec, JobState
from dtp_engine.ledger import Ledger
from dtp_engine.series import MetricHistory
from dtp_engine.settings import Settings
from dtp_trainer import wire


@dataclass(frozen=True, slots=True)
class JobView:
    """A job with what its gang last said of itself."""

    job: Job
    gang: wire.Gang | None
    """``gang.json`` of the current attempt; None before the first generation, or when it belongs to an older attempt."""
    checkpoint: wire.CheckpointEntry | None
    """The newest committed one."""


@dataclass(frozen=True, slots=True)
class Driver:
    """Who drives, as the lease says."""

    holder: str | None
    alive: bool
    beat_at: datetime | None
    log: str
    """Path of its log file."""


class Engine:
    """Open with `Engine.open`; an async context manager."""

    @classmethod
    async def open(cls, settings: Settings) -> Engine: ...

    # -- what a client asks for: each returns once the controller answered, or raises Refused with its reason
    async def submit(self, spec: JobSpec, *, key: str | None = None) -> Job: ...
    async def pause(self, ref: str) -> Job: ...
    async def resume(self, ref: str, *, from_step: int | None = None) -> Job: ...
    async def scale(self, ref: str, workers: int) -> Job: ...
    async def stop(self, ref: str) -> Job: ...
    async def kill(self, ref: str) -> Job: ...

    # -- what a client reads
    async def find(self, ref: str) -> Job:
        """By name (the newest active job of that name, else the newest), or by unique id prefix. Raises UnknownJob."""

    async def jobs(self) -> Sequence[JobView]: ...
    async def job(self, job_id: str) -> JobView: ...
    async def attempts(self, job_id: str) -> Sequence[Attempt]: ...
    async def events(self, *, after: int = 0, job_id: str | None = None) -> Sequence[Event]: ...
    def follow_events(self, *, after: int = 0, job_id: str | None = None) -> AsyncIterator[Event]:
        """Never ends by itself."""

    def watch(self, job_id: str, *, interval_s: float = 0.25) -> AsyncIterator[JobView]:
        """A view at once, then one whenever it changed; ends after a final or PAUSED state was yielded."""

    async def wait(
        self, job_id: str, *, until: Sequence[JobState] = (), timeout_s: float | None = None
    ) -> Job: ...
    def logs(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        follow: bool = False,
    ) -> AsyncIterator[tuple[int, LogLine]]:
        """(attempt, line) of all attempts (or of one), records and text; with `follow`, on through new attempts."""

    async def metrics(self, job_id: str) -> MetricHistory: ...
    async def checkpoints(self, job_id: str) -> Sequence[wire.CheckpointEntry]: ...
    async def pin(
        self, job_id: str, name_or_step: str, *, pinned: bool = True
    ) -> wire.CheckpointEntry: ...
    async def capacity(self) -> Capacity: ...

    # -- who drives
    async def driver(self) -> Driver: ...
    async def ensure_driver(self) -> None:
        """Start the background controller unless one is alive."""

    async def stop_driver(self) -> bool: ...
    async def aclose(self) -> None: ...
