"""Checkpoints: copied at the step boundary, written and hashed by a thread, real once committed.

Each rank writes its share of the state to ``checkpoints/<name>/rank-….safetensors`` and a note
beside it. Rank 0 waits for all notes, writes the manifest and commits the checkpoint to the head by
compare-and-set, which a newer generation refuses. `heads` has the fence and the retention.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch

from dtp_trainer.checkpoints import heads, manifest, tensorfile
from dtp_trainer.checkpoints.commit import Committer, Gathering, note_key
from dtp_trainer.checkpoints.heads import Fenced, Retention
from dtp_trainer.checkpoints.manifest import DamagedCheckpoint, Manifest, Share, share_file
from dtp_trainer.checkpoints.pieces import Assembly, MissingPiece, Part, Piece, part_of
from dtp_trainer.checkpoints.tensorfile import Malformed, Staging
from dtp_trainer.checkpoints.tree import (
    Json,
    Tensors,
    UnsupportedState,
    flatten,
    pieces_in,
    unflatten,
)
from dtp_trainer.storage import NotFound, Storage, StorageError, Unreadable
from dtp_trainer.wire import CheckpointEntry, checkpoint_name

_log = logging.getLogger(__name__)

_SHARED, _OWN = "shared", "own"


@dataclass(frozen=True, slots=True)
class StateBundle:
    """What a checkpoint holds, as nested dicts, lists, tuples, tensors, numpy arrays and scalars.

    Taken by reference: `Checkpointer.save` copies the tensors before it returns.
    """

    shared: Mapping[str, Any]
    """The same on all ranks (model, optimizer, scheduler …); each rank writes its share, and what
    it holds of the tensors that are a `Piece`."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Of this rank alone (states of random number generators …)."""


class Outcome(StrEnum):
    COMMITTED = "committed"
    """Rank 0: the checkpoint exists."""
    WRITTEN = "written"
    """Other ranks: this rank's share is durable; whether it becomes real is rank 0's report."""
    FAILED = "failed"
    """Nothing was committed, the checkpoint before is intact, training may go on."""
    FENCED = "fenced"
    """A newer generation owns the job; `save`, `wait` and `close` raise `Fenced` from now on."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    name: str
    step: int
    outcome: Outcome
    error: str | None
    """One line for people, with outcome FAILED or FENCED."""
    bytes: int
    """Of the whole checkpoint on rank 0, of this rank's share elsewhere; 0 when it failed."""
    blocked_s: float
    """How long `save` kept the training loop, waiting for the save before included."""
    durable_s: float
    """From the call of `save` to the commit (rank 0) or to this rank's share on disk."""
    entry: CheckpointEntry | None = None
    """With outcome COMMITTED."""


@dataclass(frozen=True, slots=True)
class _Save:
    """One save of one rank, from the copy of its tensors on."""

    number: int
    """Counts the calls of `save`, which is how ranks tell a note from that of an earlier try."""
    name: str
    step: int
    epoch: float
    values: Mapping[str, float]
    data: Mapping[str, Any]
    state: Json
    own: Json
    began: float
    blocked_s: float


class Checkpointer:
    """Saves of one rank in one generation. All ranks call `save` at the same steps.

    At most one save is in flight; `save` waits for the one before, which `busy` foretells.
    `on_report` is called on the writing thread, once a save.

    Args:
        storage: Of the job: ``jobs/<id>/``.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        generation: int,
        attempt: int,
        rank: int,
        world_size: int,
        policy: Retention,
        job: str = "",
        on_report: Callable[[SaveReport], None] | None = None,
    ) -> None:
        self._storage = storage
        self._generation, self._attempt, self._job = generation, attempt, job
        self._rank, self._world_size = rank, world_size
        self._committer = Committer(storage, generation=generation, policy=policy)
        self._on_report = on_report
        self._staging = Staging()
        self._dealt: tuple[tensorfile.Signature, list[str]] | None = None
        self._share: tuple[str, Share] | None = None
        self._saves = 0
        self._thread: threading.Thread | None = None
        self._settled = threading.Event()
        self._report: SaveReport | None = None
        self._fenced: Fenced | None = None
        self._committed: CheckpointEntry | None = None

    @property
    def busy(self) -> bool:
        """A save is still being written (differs among ranks: agree before acting on it)."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def last_committed(self) -> CheckpointEntry | None:
        """Rank 0: the newest checkpoint that this object committed."""
        return self._committed

    def prepare(self, state: StateBundle) -> None:
        """Allocate the buffers, so that the first save blocks no longer than the others.

        Optional; best after the first step, when the optimizer has its state.
        """
        self._join()
        self._staging.fit(self._flatten(state)[0])

    def save(
        self,
        state: StateBundle,
        *,
        step: int,
        epoch: float,
        values: Mapping[str, float],
        data_state: Mapping[str, Any],
        blocking: bool = False,
    ) -> SaveReport | None:
        """Copy the state now and write it in the background; with `blocking`, the report of it.

        A step that is already committed is not written again.

        Raises:
            Fenced: this or an earlier save found that a newer generation owns the job.
            UnsupportedState: `state` holds something that no checkpoint can hold; names its path.
        """
        began = time.perf_counter()
        tensors, shared, own = self._flatten(state)
        data = _plain(data_state)
        if blocking:
            self._committer.hurried.set()
        self._join()
        self._committer.hurried.clear()
        self._saves += 1
        name = checkpoint_name(step, self._generation)
        if self._committed is None or self._committed.name != name:
            # Written before, it stays as it was: the manifest may name it already.
            if self._share is None or self._share[0] != name:
                self._staging.take(tensors)
            blocked_s = time.perf_counter() - began
            numbers = {key: float(value) for key, value in values.items()}
            self._start(
                _Save(self._saves, name, step, epoch, numbers, data, shared, own, began, blocked_s)
            )
        return self.wait() if blocking else None

    def wait(self) -> SaveReport | None:
        """Until the outcome of the last save is known; its report, None before the first.

        Raises `Fenced`.
        """
        if self._thread is not None:
            self._settled.wait()
        if self._fenced:
            raise self._fenced
        return self._report

    def close(self) -> SaveReport | None:
        """`wait`, finish tidying up, free the buffers."""
        try:
            self._join()
            return self.wait()
        finally:
            self._staging.free()

    # ----------------------------------------------------------------- at the step boundary

    def _flatten(self, state: StateBundle) -> tuple[Tensors, Json, Json]:
        """What this rank writes, and the structures of the shared and its own state."""
        pieces: Tensors = {}
        shared, structure = flatten(state.shared, _SHARED, pieces)
        own, own_structure = flatten(state.own, _OWN)
        signature = tensorfile.signature(shared)
        if self._dealt is None or self._dealt[0] != signature:
            dealt = tensorfile.shares(shared, self._world_size)[self._rank]
            self._dealt = signature, dealt
        mine = {name: shared[name] for name in self._dealt[1]}
        return {**mine, **pieces, **own}, structure, own_structure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._fenced:
            raise self._fenced

    def _start(self, save: _Save) -> None:
        self._settled.clear()
        self._thread = threading.Thread(
            target=self._run, args=(save,), name="checkpoint", daemon=True
        )
        self._thread.start()

    # ----------------------------------------------------------------------- on the thread

    def _run(self, save: _Save) -> None:
        report = self._attempted(save)
        self._report = report
        if report.outcome is Outcome.FAILED:
            self._committer.expect_litter()
            _log.warning("checkpoint %s failed: %s; training goes on", save.name, report.error)
        try:
            if self._on_report:
                self._on_report(report)
        finally:
            self._settled.set()
        if report.outcome is Outcome.COMMITTED:
            self._tidy(save.step)

    def _tidy(self, step: int) -> None:
        try:
            self._committer.tidy(step)
        except Fenced as fenced:
            self._fenced = fenced
        except StorageError as error:
            _log.warning("old checkpoints could not be removed: %s", error)

    def _attempted(self, save: _Save) -> SaveReport:
        try:
            share = self._write_share(save)
            if self._rank:
                return _report(save, Outcome.WRITTEN, share.bytes)
            entry = self._commit(save, share)
        except Fenced as fenced:
            self._fenced = fenced
            return _report(save, Outcome.FENCED, error=str(fenced))
        except Exception as error:  # noqa: BLE001 - a thread has no caller; the report says it all
            text = str(error) if isinstance(error, StorageError) else repr(error)
            self._note(save, {"error": text})
            return _report(save, Outcome.FAILED, error=text)
        self._committed = entry
        return replace(_report(save, Outcome.COMMITTED, entry.bytes), entry=entry)

    def _write_share(self, save: _Save) -> Share:
        if self._share is None or self._share[0] != save.name:
            file = share_file(self._rank, self._world_size)
            spans = self._staging.spans
            with self._storage.create(manifest.key_of(save.name, file)) as target:
                size, sha256 = tensorfile.write(target, spans, self._staging.data)
            names = tuple(span.name for span in spans)
            self._share = save.name, Share(file, self._rank, size, sha256, names, save.own)
        share = self._share[1]
        if self._rank:
            self._storage.write(*self._noted(save, {"share": share.to_dict()}))
        return share

    def _note(self, save: _Save, content: Mapping[str, Any]) -> None:
        """Let rank 0 know at once; when even that fails, it gives up waiting by itself."""
        if self._rank:
            try:
                self._storage.write(*self._noted(save, content))
            except StorageError as error:
                _log.warning("rank 0 could not be told: %s", error)

    def _noted(self, save: _Save, content: Mapping[str, Any]) -> tuple[str, bytes]:
        key = note_key(save.name, self._rank, self._world_size)
        return key, json.dumps({"save": save.number, **content}).encode()

    def _commit(self, save: _Save, share: Share) -> CheckpointEntry:
        others = self._committer.gather(Gathering(save.name, save.number, self._world_size))
        return self._committer.commit(
            Manifest(
                name=save.name,
                job=self._job,
                attempt=self._attempt,
                generation=self._generation,
                world_size=self._world_size,
                step=save.step,
                epoch=save.epoch,
                at=time.time(),
                values=save.values,
                data=save.data,
                torch=torch.__version__,
                state=save.state,
                shares=(share, *others),
            ),
            since=save.began + save.blocked_s,
        )


def _report(
    save: _Save, outcome: Outcome, size: int = 0, *, error: str | None = None
) -> SaveReport:
    durable_s = time.perf_counter() - save.began
    return SaveReport(save.name, save.step, outcome, error, size, save.blocked_s, durable_s)


def _plain(data_state: Mapping[str, Any]) -> dict[str, Any]:
    try:
        copy: dict[str, Any] = json.loads(json.dumps(data_state))
    except (TypeError, ValueError) as error:
        raise UnsupportedState(f"data_state must be plain JSON: {error}") from None
    return copy


# ----------------------------------------------------------------------------------- the way back


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """Every hash of it was verified. All tensors are on the CPU, in memory of their own."""

    entry: CheckpointEntry
    shared: Mapping[str, Any]
    own: Mapping[str, Any] | None
    """Of the rank that asked; None when the checkpoint was made at another world size."""
    step: int
    epoch: float
    values: Mapping[str, float]
    data_state: Mapping[str, Any]


def load_newest(
    storage: Storage,
    *,
    rank: int = 0,
    world_size: int = 1,
    part: Part | None = None,
    on_damage: Callable[[str], None] | None = None,
) -> LoadedCheckpoint | None:
    """The resume point, or the newest one before it that is whole; None when there is none.

    Each damaged one is said by `on_damage` (one line: which file, what was expected and found, what
    is used instead; default: a warning in the log). Rank 0 marks it in the head, and the one that
    was verified. In a process group let rank 0 call this and the others `load` the name that it
    found, so that all agree.

    Raises:
        DamagedCheckpoint: there are checkpoints, and none is whole. Never begins anew in silence.
    """
    entries = heads.candidates(heads.read_head(storage))
    damage: list[str] = []
    for number, entry in enumerate(entries, start=1):
        try:
            loaded = load(storage, entry.name, rank=rank, world_size=world_size, part=part)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            instead = f"; trying {entries[number].name} instead" if number < len(entries) else ""
            refused = isinstance(error, manifest.UnreadableCheckpoint)
            what = "cannot be read" if refused else "is damaged"
            (on_damage or _log.warning)(f"checkpoint {entry.name} {what}: {error}{instead}")
            if not refused:
                _mark(storage, entry, rank, verified=False)
        else:
            _mark(storage, entry, rank, verified=True)
            return replace(loaded, entry=replace(entry, verified=True))
    if damage:
        raise DamagedCheckpoint(
            f"none of the {len(entries)} checkpoints in {storage.uri} is whole "
            f"(the first: {damage[0]}); restore a copy of one, or start a new job"
        )
    return None


def load(
    storage: Storage, name: str, *, rank: int = 0, world_size: int = 1, part: Part | None = None
) -> LoadedCheckpoint:
    """The checkpoint of that name, at any world size.

    Shared tensors of which `part` wants but some rows come as a `Piece`: beside these rows, no more
    than the file of one rank is in memory at a time. Every hash is verified all the same.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or changed; the message says which.
    """
    whole = manifest.read_manifest(storage, name)
    shared: dict[str, torch.Tensor | Piece] = {}
    own: Tensors = {}
    pieces = _assembly(whole, part)
    for share in whole.shares:
        mine = share.rank == rank and whole.world_size == world_size
        for key, tensor in _read_share(storage, name, share, pieces).items():
            if _is_own(key):
                own |= {key: tensor} if mine else {}
            elif pieces.has(key):
                pieces.take(key, tensor)
            else:
                shared[key] = part_of(key, tensor, part)
    structures = {s.rank: s.own for s in whole.shares if whole.world_size == world_size}
    try:
        return LoadedCheckpoint(
            entry=whole.entry(verified=True),
            shared=unflatten(whole.state, shared | pieces.tensors()),
            own=unflatten(structures[rank], own) if rank in structures else None,
            step=whole.step,
            epoch=whole.epoch,
            values=whole.values,
            data_state=whole.data,
        )
    except MissingPiece as error:
        raise DamagedCheckpoint(f"{name}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{name}: its files do not fit its manifest: {error!r}") from None


def _assembly(whole: Manifest, part: Part | None) -> Assembly:
    try:
        return Assembly(pieces_in(whole.state), part)
    except (KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{whole.name}: its manifest makes no sense: {error!r}") from None


def _read_share(storage: Storage, name: str, share: Share, pieces: Assembly) -> Tensors:
    key = manifest.key_of(name, share.file)
    try:
        with storage.open(key) as file:
            tensors, sha256 = tensorfile.read(file, share.bytes, room=pieces.room)
    except Malformed as error:
        with storage.open(key) as file:
            manifest.check_share(name, share, *manifest.hash_of(file))
        raise DamagedCheckpoint(f"{name}/{share.file} {error}") from None
    except (NotFound, Unreadable) as error:
        raise manifest.not_given(name, share.file, error) from None
    manifest.check_share(name, share, share.bytes, sha256)
    return tensors


def _is_own(name: str) -> bool:
    return name == _OWN or name.startswith(f"{_OWN}.")


def _mark(storage: Storage, entry: CheckpointEntry, rank: int, *, verified: bool) -> None:
    if rank or entry.verified is verified:
        return
    try:
        heads.set_verified(storage, entry.name, verified=verified)
    except StorageError as error:  # one who may only read can load all the same
        _log.info("the check of %s was not noted: %s", entry.name, error)
