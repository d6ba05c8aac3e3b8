"""Jobs as clients see them: the ledger's word beside what lies in the storage of each job."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dtp_engine import checkpoints
from dtp_engine.backends import job_storage_uri
from dtp_engine.checkpoints import Between
from dtp_engine.door import Door
from dtp_engine.errors import Damaged
from dtp_engine.jobs import Job
from dtp_engine.settings import Settings
from dtp_trainer import wire
from dtp_trainer.checkpoints.grace import too_short
from dtp_trainer.storage import Storage, open_storage

T = TypeVar("T")

_LENGTH_S = 86_400.0
_NOTICE_S = 5.0


@dataclass(frozen=True, slots=True)
class JobView:
    """A job with what its gang last said of itself."""

    job: Job
    gang: wire.Gang | None
    """``gang.json`` of the current attempt; None before its first generation."""
    checkpoint: wire.CheckpointEntry | None
    """The one from which the job would go on."""
    checkpoint_problem: str = ""
    """Why nobody can tell which checkpoints there are, and what to do; empty when one can."""

    @property
    def grace_problem(self) -> str:
        """What to do when a checkpoint takes longer than a stop may; empty when it does not."""
        grace_s = self.job.spec.stop_grace.total_seconds()
        return (self.checkpoint and too_short(self.checkpoint, grace_s)) or ""


class JobStorages:
    """The storages of all jobs of one state folder, read beside the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._door = Door("dtp-storage", deadline_s=30)
        self._ended: dict[str, JobView] = {}

    async def run(self, call: Callable[[], T]) -> T:
        """A blocking call, in its turn."""
        return await self._door.run(call)

    async def of(self, job_id: str, call: Callable[[Storage], T]) -> T:
        """A blocking call with the storage of one job."""
        storage = self._open(job_id)
        return await self._door.run(lambda: call(storage))

    async def at_length(self, job_id: str, call: Callable[[Storage, Between], T]) -> T:
        """As `of`, without a deadline and beside the other calls; a caller that is cancelled waits
        until the call has noticed."""
        storage, stopped = self._open(job_id), threading.Event()

        def between() -> None:
            if stopped.is_set():
                raise InterruptedError

        door = Door("dtp-length", deadline_s=_LENGTH_S)
        working = asyncio.ensure_future(door.run(lambda: call(storage, between)))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            stopped.set()
            done, _ = await asyncio.wait([working], timeout=_NOTICE_S)
            for each in done:
                each.exception()  # the one by which it ended: heard, and of no interest
            raise
        finally:
            door.close()

    async def views(self, jobs: Sequence[Job]) -> list[JobView]:
        return await self._door.run(lambda: [self._view(job) for job in jobs])

    def close(self) -> None:
        self._door.close()

    def _view(self, job: Job) -> JobView:
        """What a job that has ended left behind is read once."""
        if job.attempt == 0:
            return JobView(job, None, None)
        if (seen := self._ended.get(job.id)) is not None and seen.job == job:
            return seen
        storage = self._open(job.id)
        view = JobView(job, checkpoints.gang(storage, job.attempt), *_newest(storage))
        if job.state.final and not view.checkpoint_problem:
            self._ended[job.id] = view
        return view

    def _open(self, job_id: str) -> Storage:
        return open_storage(job_storage_uri(self._settings.home, job_id, self._settings.storage))


def _newest(storage: Storage) -> tuple[wire.CheckpointEntry | None, str]:
    """The checkpoint to go on from, or why their list cannot be read: a job is more than that."""
    try:
        return checkpoints.newest(storage), ""
    except Damaged as error:
        return None, str(error)
