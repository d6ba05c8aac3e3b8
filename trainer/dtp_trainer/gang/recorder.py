"""What the leader hears, kept: the history in storage, and the trackers that the job asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from dtp_trainer.gang.messages import Beat
from dtp_trainer.history import HistoryWriter
from dtp_trainer.storage import Storage, StorageError
from dtp_trainer.wire import Exit, ExitCode, GangEvent, Host, Launch, Record, Window
from dtp_trainer.worker.lines import Lines
from dtp_trainer.worker.tracking import TrackersProcess

WRITE_EVERY_S = 20.0
"""What a leader that is killed takes with it, of the history."""
LONGEST_BACKLOG = 20_000
COMPLAIN_AFTER = 3
"""Writes that failed in a row; whoever leads says at once what storage refuses."""
HISTORY_WITHIN_S = 3.0
TRACKERS_WITHIN_S = 15.0
SHARE_OF_GRACE = 0.3
"""Of a worker that was asked to leave, for its trackers; they seldom need a second."""

log = logging.getLogger("dtp.recorder")


class Recorder:
    """One a leadership. Nothing here raises, or makes the leader wait."""

    def __init__(self, launch: Launch, storage: Storage, *, term: int, lines: Lines) -> None:
        self._launch, self._lines = launch, lines
        self._writer = HistoryWriter(storage, attempt=launch.attempt, term=term)
        self._batch: list[Record] = []
        self._windows: dict[int, float] = {}
        self._hosts: dict[int, float] = {}
        self._failures = 0
        self._writing = asyncio.Lock()
        self._keeping = asyncio.get_running_loop().create_task(self._keep())
        self._trackers: TrackersProcess | None = None
        if launch.trackers:
            self._trackers = TrackersProcess(launch, term=term, say=self._say)

    def announce(self, event: GangEvent) -> None:
        """An event; it is printed as well."""
        self._lines.record(event)
        self._take(event)

    def heard(self, beat: Beat) -> None:
        """A heartbeat; what it repeats of the one before is known."""
        if (window := beat.window) is not None and self._is_new(self._windows, window):
            self._take(window)
        if (host := beat.host) is not None and self._is_new(self._hosts, host):
            self._take(host)

    async def close(self, ending: Exit | None) -> None:
        """The attempt ended so, or (None) another leader goes on."""
        self._keeping.cancel()
        await asyncio.gather(self._write_in_time(), self._close_trackers(ending))

    # ------------------------------------------------------------------------------------ inside

    @staticmethod
    def _is_new(seen: dict[int, float], record: Window | Host) -> bool:
        is_new = record.at > seen.get(record.worker, float("-inf"))
        if is_new:
            seen[record.worker] = record.at
        return is_new

    def _take(self, record: Record) -> None:
        if len(self._batch) < LONGEST_BACKLOG:
            self._batch.append(record)
        if self._trackers is not None:
            self._trackers.feed(record)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(WRITE_EVERY_S)
            await self._write()

    async def _write(self) -> None:
        async with self._writing:
            batch, self._batch = self._batch, []
            try:
                await asyncio.to_thread(self._writer.write, batch)
            except StorageError as error:
                self._failures += 1
                if self._failures == COMPLAIN_AFTER:
                    log.warning("the history of metrics cannot be written: %s", error)
            else:
                self._failures = 0

    async def _write_in_time(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HISTORY_WITHIN_S):
                await self._write()

    async def _close_trackers(self, ending: Exit | None) -> None:
        if self._trackers is None:
            return
        left = ending is None or ending.code == ExitCode.PAUSED
        share_s = max(1.0, self._launch.grace_s * SHARE_OF_GRACE)
        within_s = min(TRACKERS_WITHIN_S, share_s) if left else TRACKERS_WITHIN_S
        await self._trackers.close(ending, within_s=within_s)

    def _say(self, text: str) -> None:
        self._lines.say(f"worker{self._launch.worker}", text)
