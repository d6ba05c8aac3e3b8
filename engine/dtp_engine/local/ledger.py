"""The Ledger of this machine: one SQLite file shared by every client and the controller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dtp_engine.door import DeadlinePassed, Door
from dtp_engine.errors import LedgerError
from dtp_engine.jobs import Attempt, Event, Job, Request
from dtp_engine.ledger import Change, Lease
from dtp_engine.local.database import BUSY_S
from dtp_engine.local.records import Records

T = TypeVar("T")

ANSWER_WITHIN_S = 3 * BUSY_S
"""Longer than SQLite's own wait for a lock, also when another call waits before ours."""


class LocalLedger:
    """Implements `dtp_engine.ledger.Ledger`. Open with `LocalLedger.open`.

    A ledger in memory runs its calls inline, which never blocks and is quick; one in a file runs
    them on a thread of its own, one after the other.
    """

    def __init__(self, records: Records, door: Door | None) -> None:
        self._records = records
        self._door = door

    @classmethod
    async def open(cls, path: Path | str, *, busy_s: float = BUSY_S) -> LocalLedger:
        """`path` may be ``:memory:``. Creates and migrates as needed; `busy_s` is how long a call
        waits for another process's transaction. Raises `LedgerError`."""
        if str(path) == ":memory:":
            return cls(Records(None), None)
        door = Door("dtp-ledger", deadline_s=ANSWER_WITHIN_S)
        try:
            records = await _through(door, Path(path), lambda: Records(Path(path), busy_s=busy_s))
        except BaseException:
            door.close()
            raise
        return cls(records, door)

    async def request(self, request: Request, *, job: Job | None = None) -> Request:
        return await self._run(lambda: self._records.request(request, job))

    async def read_request(self, key: str) -> Request | None:
        return await self._run(lambda: self._records.read_request(key))

    async def pending(self) -> Sequence[Request]:
        return await self._run(self._records.pending)

    async def jobs(self, *, active_only: bool = False) -> Sequence[Job]:
        return await self._run(lambda: self._records.jobs(active_only))

    async def job(self, job_id: str) -> Job | None:
        return await self._run(lambda: self._records.job(job_id))

    async def attempts(self, job_ids: Sequence[str]) -> Sequence[Attempt]:
        return await self._run(lambda: self._records.attempts(job_ids))

    async def events(
        self, *, after: int = 0, job_id: str | None = None, limit: int = 1000
    ) -> Sequence[Event]:
        return await self._run(lambda: self._records.events(after, job_id, limit))

    async def lease(self) -> Lease | None:
        return await self._run(self._records.lease)

    async def take_lease(self, holder: str, *, over: Lease | None) -> Lease | None:
        return await self._run(lambda: self._records.take_lease(holder, over))

    async def renew_lease(self, lease: Lease) -> Lease:
        return await self._run(lambda: self._records.renew_lease(lease))

    async def release_lease(self, lease: Lease) -> None:
        await self._run(lambda: self._records.release_lease(lease))

    async def commit(self, lease: Lease, change: Change) -> Job:
        return await self._run(lambda: self._records.commit(lease, change))

    async def revision(self) -> int:
        return await self._run(self._records.revision)

    async def aclose(self) -> None:
        try:
            await self._run(self._records.close)
        finally:
            if self._door is not None:
                self._door.close()

    async def _run(self, call: Callable[[], T]) -> T:
        if self._door is None:
            return call()
        return await _through(self._door, self._records.path, call)


async def _through(door: Door, path: Path | None, call: Callable[[], T]) -> T:
    try:
        return await door.run(call)
    except DeadlinePassed:
        raise LedgerError(
            f"the ledger {path} did not answer in {ANSWER_WITHIN_S:g} s; is its disk responding?"
        ) from None
