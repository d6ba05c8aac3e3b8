"""The Ledger protocol: jobs, attempts, requests, events, the lease. Implementations: local
(SQLite), later aws (DynamoDB).

Clients call `request` and read; only the lease holder calls `commit`. One commit = fence + change
+ events, all or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from dtp_engine.jobs import Attempt, Event, Job, Request


@dataclass(frozen=True, slots=True)
class Lease:
    holder: str
    """``host:pid:start-time`` of the process that drives."""
    token: int
    """Grows with every change of holder; in every commit."""
    beat: int
    """Grows with every renewal. A reader that saw the same (token, beat) for the lease's time to
    live may take over."""
    at: datetime
    """When the holder wrote it, by its own clock; for people, never for deciding expiry."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one commit writes. `job.version` is the version that was read; the ledger stores it
    plus one."""

    job: Job
    attempts: tuple[Attempt, ...] = ()
    """Upserted by (job_id, number)."""
    events: tuple[Event, ...] = ()
    """Appended; `seq` is assigned by the ledger."""
    answered: tuple[Request, ...] = ()
    """Requests with `answered_at` (and `refusal`) set."""


class Ledger(Protocol):
    """Errors: `LedgerError` (locked, read-only, newer version, disk full)."""

    async def request(self, request: Request, *, job: Job | None = None) -> Request:
        """Record a request, once per key; returns the stored one, answered or not. SUBMIT brings
        its job (QUEUED)."""
        ...

    async def read_request(self, key: str) -> Request | None: ...

    async def pending(self) -> Sequence[Request]:
        """Unanswered requests, oldest first."""
        ...

    async def jobs(self, *, active_only: bool = False) -> Sequence[Job]:
        """Oldest first."""
        ...

    async def job(self, job_id: str) -> Job | None: ...

    async def attempts(self, job_ids: Sequence[str]) -> Sequence[Attempt]:
        """All attempts of these jobs, oldest first."""
        ...

    async def events(
        self, *, after: int = 0, job_id: str | None = None, limit: int = 1000
    ) -> Sequence[Event]:
        """Events with seq > after, oldest first."""
        ...

    async def lease(self) -> Lease | None: ...

    async def take_lease(self, holder: str, *, over: Lease | None) -> Lease | None:
        """Take a lease that is free (`over` None) or whose last seen state `over` is stale; None
        when it moved meanwhile."""
        ...

    async def renew_lease(self, lease: Lease) -> Lease:
        """Raises `LeaseLost`."""
        ...

    async def release_lease(self, lease: Lease) -> None: ...

    async def commit(self, lease: Lease, change: Change) -> Job:
        """Raises `LeaseLost` when the token is not the newest, or when `job.version` moved.
        Returns the stored job."""
        ...

    async def revision(self) -> int:
        """A cheap number that moves with every write by anybody; the wake-up of the controller and
        of watchers."""
        ...

    async def aclose(self) -> None: ...
