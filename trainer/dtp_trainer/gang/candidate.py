"""Standing for election, and leading: an agent's share in its gang having a leader.

A leader that fails by a mistake of ours says so in ``gang.json``. Whoever comes next waits longer
each time, and after a few in a row the gang ends with the reason instead of trying for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dtp_trainer.gang import election, links
from dtp_trainer.gang.chronicle import continued
from dtp_trainer.gang.election import Mandate, Sight
from dtp_trainer.gang.leader import Leader
from dtp_trainer.gang.office import Office
from dtp_trainer.gang.recorder import Recorder
from dtp_trainer.gang.report import inherit
from dtp_trainer.storage import Conflict, Storage, StorageError
from dtp_trainer.wire import (
    GANG_KEY,
    Exit,
    ExitCode,
    Gang,
    GangEvent,
    GangPhase,
    Launch,
    encode_object,
)
from dtp_trainer.worker import steady

FAILURES_IN_A_ROW = 4
FIRST_PAUSE_S = 0.25
LONGER_BY = 4.0
TRACEBACK_FILE = "leader-error.txt"

log = logging.getLogger("dtp.leader")


def pause_s(failures: int) -> float:
    """How long nobody leads after so many leaders in a row have failed.

    >>> [pause_s(n) for n in range(4)]
    [0.0, 0.25, 1.0, 4.0]
    """
    return FIRST_PAUSE_S * LONGER_BY ** (failures - 1) if failures else 0.0


class Candidate:
    """One agent's: stands for election when asked to, and leads when elected.

    record: what keeps the events and beats of a term. complain: called with storage that refuses.
    """

    def __init__(
        self,
        launch: Launch,
        storage: Storage,
        *,
        record: Callable[[int], Recorder],
        complain: Callable[[StorageError], None],
    ) -> None:
        self._launch, self._storage = launch, storage
        self._record, self._complain = record, complain
        self._leading: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        """Of what earlier terms recorded."""

    async def campaign(self, sight: Sight, *, unchanged_s: float) -> bool:
        """Try to become leader; True when somebody leads now. `unchanged_s`: for so long
        ``gang.json`` has been as in `sight`."""
        if self._leading is not None and not self._leading.done():
            return False
        if sight.gang is not None and unchanged_s < self._pause_after(sight.gang):
            return False
        elected: asyncio.Future[Leader] = asyncio.get_running_loop().create_future()
        server = await self._open_door(elected)
        try:
            mandate = await self._win(sight, server.sockets[0].getsockname()[1])
        except StorageError as error:
            elected.cancel()
            server.close()
            if not isinstance(error, Conflict):
                self._complain(error)
            return isinstance(error, Conflict)
        self._leading = asyncio.create_task(self._lead(sight.gang, mandate, elected, server))
        return True

    async def retire(self, within_s: float) -> None:
        """Others may still be reading their dismissal; what was recorded is still being written."""
        if self._leading is not None:
            await asyncio.wait([self._leading], timeout=within_s)
            self._leading.cancel()
            await asyncio.wait([self._leading])
        if self._closing and within_s > 0:
            await asyncio.wait(self._closing)

    def _pause_after(self, gang: Gang) -> float:
        return pause_s(gang.leader_errors) if gang.attempt == self._launch.attempt else 0.0

    async def _win(self, sight: Sight, port: int) -> Mandate:
        """Raises `Conflict` when another worker was faster, `StorageError`."""
        launch = self._launch
        return await asyncio.to_thread(
            election.take_office,
            self._storage,
            sight,
            attempt=launch.attempt,
            worker=launch.worker,
            address=f"{launch.host}:{port}",
        )

    async def _lead(
        self,
        previous: Gang | None,
        mandate: Mandate,
        elected: asyncio.Future[Leader],
        server: asyncio.Server,
    ) -> None:
        recorder, leader, ending = self._record(mandate.term), None, None
        try:
            leader = self._leader(previous, mandate, recorder)
            elected.set_result(leader)
            await leader.run()
            ending = leader.ending
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not go on for ever
            elected.cancel()
            await self._own_up(mandate, error, recorder)
        finally:
            server.close()
            if leader is not None:
                leader.close()
            self._close(recorder, ending)

    def _close(self, recorder: Recorder, ending: Exit | None) -> None:
        closing = asyncio.get_running_loop().create_task(recorder.close(ending))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _leader(self, previous: Gang | None, mandate: Mandate, recorder: Recorder) -> Leader:
        state = inherit(previous, self._launch, steady.now())
        office = Office(self._storage, mandate)
        told = previous.events[-1].seq if previous and previous.events else 0
        return Leader(self._launch, self._storage, office, state, recorder, told=told)

    async def _open_door(self, elected: asyncio.Future[Leader]) -> asyncio.Server:
        """A server that hands its visitors to the leader, as soon as it is elected."""

        async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                leader = await asyncio.shield(elected)
            except asyncio.CancelledError:
                writer.close()
            else:
                await leader.welcome(reader, writer)

        return await asyncio.start_server(visit, self._launch.host, 0, limit=links.LONGEST_LINE)

    async def _own_up(self, mandate: Mandate, error: Exception, recorder: Recorder) -> None:
        """Said in one line, counted for all to see; the rest is in a file."""
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        path = Path(self._launch.scratch) / TRACEBACK_FILE
        with contextlib.suppress(OSError):
            path.write_text("".join(traceback.format_exception(error)))
        log.error("the leader failed: %s; its traceback is in %s", why, path)
        try:
            told = await asyncio.to_thread(record_failure, self._storage, mandate, why)
        except StorageError as trouble:
            self._complain(trouble)
            return
        if told is not None:
            recorder.announce(told)


def record_failure(storage: Storage, mandate: Mandate, why: str) -> GangEvent | None:
    """Count in ``gang.json`` that the leader with this mandate failed; after too many in a row, end
    the gang. The event that tells of the end, if it is one.

    Raises:
        StorageError: it could not be written, or somebody else was faster.
    """
    sight = election.look(storage)
    gang = sight.gang
    if gang is None or gang.phase == GangPhase.ENDED:
        return None
    if (gang.attempt, gang.term, gang.leader) != (mandate.attempt, mandate.term, mandate.worker):
        return None
    failures = gang.leader_errors + 1
    failed = replace(gang, leader_errors=failures, leader_error=why)
    if failures >= FAILURES_IN_A_ROW:
        failed = _ended(failed, f"the leader failed {failures} times in a row: {why}")
    storage.write_if(GANG_KEY, encode_object(failed), tag=sight.tag)
    return failed.events[-1] if failed.phase == GangPhase.ENDED else None


def _ended(gang: Gang, reason: str) -> Gang:
    chronicle = continued(gang).tell(time.time(), "gang_ended", reason, step=gang.step)
    return replace(
        gang,
        phase=GangPhase.ENDED,
        outcome=int(ExitCode.FAILED),
        detail=reason,
        events=chronicle.events,
        updated=time.time(),
    )
