"""Reads the newest checkpoint back while the gang trains, so that damage is known before it counts.

In the leader's agent, not in a rank: no training thread waits for it, or shares its interpreter.
Only folders: S3 compared a checksum with each upload, and reading back would cost traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dtp_trainer.checkpoints import heads
from dtp_trainer.checkpoints.manifest import DamagedCheckpoint, UnreadableCheckpoint, verify
from dtp_trainer.gang.state import Noted
from dtp_trainer.storage import Storage, StorageError

LOOK_EVERY_S = 2.0
REST = 3.0
"""Seconds of rest for each of reading, so that it takes a quarter of a core and disk at most."""
LOWEST_PRIORITY = 19

log = logging.getLogger("dtp.leader")


@contextmanager
def auditing(storage: Storage, tell: Callable[[Noted], None]) -> Iterator[None]:
    """While the block runs, each newest checkpoint is read back once; `tell` is called on the event
    loop with one that is damaged."""
    if not storage.uri.startswith("file:"):
        yield
        return
    loop = asyncio.get_running_loop()

    def told(noted: Noted) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, noted)

    auditor = Auditor(storage, told)
    auditor.start()
    try:
        yield
    finally:
        auditor.stop()


class Auditor:
    """A thread of low priority. `tell` is called on it."""

    def __init__(self, storage: Storage, tell: Callable[[Noted], None]) -> None:
        self._storage, self._tell = storage, tell
        self._stopped = threading.Event()
        self._seen = ""
        """The newest checkpoint that needs no other look."""

    def start(self) -> None:
        threading.Thread(target=self._work, daemon=True, name="audit").start()

    def stop(self) -> None:
        self._stopped.set()

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        while not self._stopped.wait(LOOK_EVERY_S):
            try:
                self.look()
            except InterruptedError:
                return
            except StorageError as error:
                log.info("checkpoints are not read back: %s", error)

    def look(self) -> None:
        """Read the newest checkpoint back, unless that was done.

        Raises:
            StorageError: the storage fails; whether the checkpoint is good is not known.
            InterruptedError: `stop` was called.
        """
        entries = heads.read_head(self._storage).entries
        newest = max(entries, key=lambda entry: (entry.generation, entry.step), default=None)
        if newest is None or newest.name == self._seen:
            return
        if newest.verified is None:
            self._check(newest.name)
        self._seen = newest.name

    def _check(self, name: str) -> None:
        try:
            verify(self._storage, name, between=_Rests(self._stopped))
        except UnreadableCheckpoint:
            raise
        except DamagedCheckpoint as damage:
            listed = heads.set_verified(self._storage, name, verified=False).entries
            if any(entry.name == name for entry in listed):  # else it was given up meanwhile
                self._tell(Noted("checkpoint_damaged", f"checkpoint {name} is damaged: {damage}"))
        else:
            heads.set_verified(self._storage, name, verified=True)


class _Rests:
    """Called between pieces of work: rests in proportion to what the last one took."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._began = time.monotonic()

    def __call__(self) -> None:
        if self._stopped.wait(REST * (time.monotonic() - self._began)):
            raise InterruptedError
        self._began = time.monotonic()
