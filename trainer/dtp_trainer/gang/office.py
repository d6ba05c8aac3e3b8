"""What a leader may do as long as it is one: write ``gang.json``, raise the fence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from dtp_trainer.checkpoints import heads
from dtp_trainer.gang import election
from dtp_trainer.gang.election import Mandate
from dtp_trainer.gang.report import report
from dtp_trainer.gang.state import State
from dtp_trainer.storage import Conflict, Storage, StorageError
from dtp_trainer.wire import GANG_KEY, CheckpointEntry, CheckpointHead, encode_object


class Deposed(Exception):
    """Another worker, or another attempt, has taken over."""


class Office:
    """One write at a time; each proves, when it succeeds, that nobody else has taken over."""

    def __init__(self, storage: Storage, mandate: Mandate) -> None:
        self._storage, self._mandate = storage, mandate
        self._turn = asyncio.Lock()
        self._written_at = 0.0

    @property
    def address(self) -> str:
        return self._mandate.address

    async def publish(self, state: Callable[[], State]) -> None:
        """Write the newest state; a write that began after this call counts for it.

        Raises:
            Deposed: somebody else leads.
            StorageError: it could not be written.
        """
        asked_at = time.monotonic()
        async with self._turn:
            if self._written_at > asked_at:
                return
            began_at = time.monotonic()
            await self._write(state())
            self._written_at = began_at

    async def _write(self, state: State) -> None:
        mine = self._mandate
        status = report(
            state, attempt=mine.attempt, term=mine.term, address=mine.address, now=time.time()
        )
        data = encode_object(status)
        try:
            tag = await asyncio.to_thread(self._storage.write_if, GANG_KEY, data, tag=mine.tag)
        except Conflict:
            found = await asyncio.to_thread(self._confirm)
            tag = await asyncio.to_thread(self._replace, data, found)
        self._mandate = replace(mine, tag=tag)

    def _confirm(self) -> str:
        """The tag of what is there, if this leader wrote it and only its answer was lost."""
        sight = election.look(self._storage)
        gang, mine = sight.gang, self._mandate
        if gang is None or sight.tag is None:
            raise StorageError(f"{GANG_KEY} was removed or damaged by somebody else")
        if (gang.attempt, gang.term, gang.leader) != (mine.attempt, mine.term, mine.worker):
            raise Deposed
        return sight.tag

    def _replace(self, data: bytes, tag: str) -> str:
        try:
            return self._storage.write_if(GANG_KEY, data, tag=tag)
        except Conflict as error:
            raise Deposed from error


def raise_fence(storage: Storage, at_least: int) -> int:
    """A generation that nobody else has; from now on no older one can commit a checkpoint."""

    def change(head: CheckpointHead) -> CheckpointHead:
        return replace(head, generation=max(head.generation + 1, at_least))

    return heads.change_head(storage, change).generation


def unseen(head: CheckpointHead, state: State) -> list[CheckpointEntry]:
    """Checkpoints that were not told of yet, oldest first."""
    new = [e for e in head.entries if (e.generation, e.step) > state.chronicle.checkpoint]
    return sorted(new, key=lambda entry: (entry.generation, entry.step))
