"""What rank 0 does for all: gather the shares, commit, give up what is old."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dtp_trainer.checkpoints import heads, manifest
from dtp_trainer.checkpoints.heads import Retention
from dtp_trainer.checkpoints.manifest import (
    DamagedCheckpoint,
    Manifest,
    Share,
    UnreadableCheckpoint,
    share_file,
)
from dtp_trainer.storage import NotFound, Storage, StorageError
from dtp_trainer.wire import CheckpointEntry, CheckpointHead

_log = logging.getLogger(__name__)

_GATHER_WITHIN_S = 600.0
_POLL_S, _POLL_AT_MOST_S = 0.02, 0.5
_FENCE_EVERY_S = 1.0


def note_key(name: str, rank: int, world_size: int) -> str:
    """Where a rank says that its share of a checkpoint is written, or why it is not."""
    return manifest.key_of(name, f"{share_file(rank, world_size)}.json")


@dataclass(frozen=True, slots=True)
class Gathering:
    """Of which save the shares are wanted."""

    name: str
    number: int
    """A note of another number is left from an earlier try."""
    world_size: int


class _Hurried(Exception):
    """What can wait has to."""


class Committer:
    """Commits of one generation. Not thread-safe, `hurried` apart: one thread at a time."""

    hurried: threading.Event
    """Set while somebody waits for the next save: `tidy` leaves reading back to the one after."""

    def __init__(self, storage: Storage, *, generation: int, policy: Retention) -> None:
        self._storage, self._generation, self._policy = storage, generation, policy
        self.hurried = threading.Event()
        self._owed = False
        self._litter = True

    def gather(self, wanted: Gathering) -> list[Share]:
        """The shares of all ranks but this one, by rank.

        Raises:
            Fenced: a newer generation was started meanwhile.
            StorageError: a rank failed, or has not written its share in time.
        """
        found: dict[int, Share] = {}
        now = time.monotonic()
        pause_s, deadline, look_at_fence = _POLL_S, now + _GATHER_WITHIN_S, now + _FENCE_EVERY_S
        while missing := [r for r in range(1, wanted.world_size) if r not in found]:
            arrived = {rank: s for rank in missing if (s := self._look(wanted, rank))}
            found |= arrived
            if arrived:
                continue
            now = time.monotonic()
            if now > deadline:
                self._litter = True
                raise StorageError(
                    f"ranks {missing} wrote no share within {_GATHER_WITHIN_S:.0f} s"
                )
            if now > look_at_fence:
                heads.check_fence(heads.read_head(self._storage), self._generation)
                look_at_fence = now + _FENCE_EVERY_S
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_AT_MOST_S)
        return [found[rank] for rank in sorted(found)]

    def commit(self, whole: Manifest, *, since: float) -> CheckpointEntry:
        """Write the manifest and enter the checkpoint in the head. Raises `Fenced`.

        since: On `time.perf_counter`, when its tensors were copied.
        """
        # Before the manifest, too: nothing of a generation that is over should look complete.
        heads.check_fence(heads.read_head(self._storage), self._generation)
        self._storage.write(manifest.key_of(whole.name), manifest.encode(whole))
        entry = replace(whole.entry(), seconds=round(time.perf_counter() - since, 3))
        heads.commit(self._storage, entry)
        return entry

    def tidy(self, step: int) -> None:
        """After a commit at `step`: give up what retention does not keep, sweep what never became
        a checkpoint. Nothing here can undo the commit. Raises `Fenced`, `StorageError`."""
        try:
            self._retain()
            if self._litter:
                self._sweep((self._generation, step))
        except StorageError:
            self._litter = True
            raise
        self._litter = False

    def expect_litter(self) -> None:
        """A save failed: sweep after the next commit."""
        self._litter = True

    def _look(self, wanted: Gathering, rank: int) -> Share | None:
        try:
            data = self._storage.read(note_key(wanted.name, rank, wanted.world_size))
        except NotFound:
            return None
        note = json.loads(data)
        if note["save"] != wanted.number:
            return None
        if "error" in note:
            raise StorageError(f"rank {rank}: {note['error']}")
        return Share.from_dict(note["share"])

    def _retain(self) -> None:
        head = heads.read_head(self._storage)
        for _ in head.entries:
            unsure = heads.to_verify(head, self._policy)
            if unsure is None:
                break
            try:
                head = self._verified(unsure.name)
            except _Hurried:
                self._owed = True
                return
        self._owed = False
        gone = [entry.name for entry in heads.surplus(head, self._policy)]
        if gone:
            left = heads.drop(self._storage, gone, generation=self._generation)
            self._delete(gone, left)

    def _sweep(self, now: tuple[int, int]) -> None:
        """Folders of earlier generations, or of earlier steps of this one, that are not listed."""
        head = heads.read_head(self._storage)
        heads.check_fence(head, self._generation)
        keys = self._storage.list(f"{heads.FOLDER}/")
        folders = {entry.key.split("/")[1] for entry in keys}
        ages = {folder: heads.parse_name(folder) for folder in folders}
        self._delete((folder for folder, age in ages.items() if age and age < now), head)

    def _delete(self, names: Iterable[str], head: CheckpointHead) -> None:
        listed = {entry.name for entry in head.entries}
        for name in sorted(set(names) - listed):
            self._storage.delete(f"{heads.FOLDER}/{name}")

    def _verified(self, name: str) -> CheckpointHead:
        """Read a checkpoint back and note the outcome in the head."""
        try:
            manifest.verify(self._storage, name, between=self._check_hurry)
        except UnreadableCheckpoint:
            raise
        except DamagedCheckpoint as damage:
            _log.warning("checkpoint %s is damaged: %s", name, damage)
            return heads.set_verified(self._storage, name, verified=False)
        return heads.set_verified(self._storage, name, verified=True)

    def _check_hurry(self) -> None:
        # Never twice in a row: where every save is waited for, old ones must go all the same.
        if self.hurried.is_set() and not self._owed:
            raise _Hurried
