"""What a job has in its storage, as clients read it: its checkpoints, and the gang's last word.

Blocking; the trainer's errors become ours here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from dtp_engine.errors import Damaged, InfrastructureError, Refused
from dtp_trainer import wire
from dtp_trainer.checkpoints import contents, heads
from dtp_trainer.checkpoints.contents import Tensor
from dtp_trainer.checkpoints.export import export
from dtp_trainer.checkpoints.manifest import (
    DamagedCheckpoint,
    Manifest,
    UnreadableCheckpoint,
    read_manifest,
    verify,
)
from dtp_trainer.storage import Storage, StorageError

T = TypeVar("T")
Between: TypeAlias = Callable[[], None]
"""Called every few megabytes of something that takes long; what it raises ends it."""

MODEL, OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True, slots=True)
class Contents:
    entry: wire.CheckpointEntry
    manifest: Manifest
    tensors: tuple[Tensor, ...]
    """Those that all ranks share, in the order of the script."""


@dataclass(frozen=True, slots=True)
class Exported:
    entry: wire.CheckpointEntry
    bytes: int
    tensors: int


def entries(storage: Storage) -> tuple[wire.CheckpointEntry, ...]:
    """Oldest first; none before the first commit."""
    return _mapped(lambda: heads.read_head(storage)).entries


def newest(storage: Storage) -> wire.CheckpointEntry | None:
    """The one from which the next generation would start."""
    found = heads.candidates(_mapped(lambda: heads.read_head(storage)))
    return found[0] if found else None


def find(storage: Storage, name_or_step: str) -> wire.CheckpointEntry:
    """Raises `Refused` with what there is."""
    return _mapped(lambda: heads.find(heads.read_head(storage), name_or_step))


def pin(storage: Storage, name_or_step: str, *, pinned: bool) -> wire.CheckpointEntry:
    """Keep a checkpoint whatever the retention says, or give it back to it."""
    return _mapped(lambda: heads.pin(storage, name_or_step, pinned=pinned))


def choose(storage: Storage, name_or_step: str | None) -> wire.CheckpointEntry:
    """The one that is named, or else the one from which the job would go on."""
    if name_or_step is not None:
        return find(storage, name_or_step)
    if (found := newest(storage)) is None:
        raise Refused("the job has no checkpoint yet")
    return found


def look_into(storage: Storage, name_or_step: str | None) -> Contents:
    """What a checkpoint holds; of its files, the headers are read. Raises `InfrastructureError`
    for one that is damaged."""
    entry = choose(storage, name_or_step)
    manifest = _mapped(lambda: read_manifest(storage, entry.name))
    return Contents(entry, manifest, tuple(_mapped(lambda: contents.tensors_of(storage, manifest))))


def check(storage: Storage, between: Between, *, name: str) -> str | None:
    """Read a checkpoint back, compare every hash and mark it; None when it is whole, else which
    file is not."""
    try:
        _mapped(lambda: _whole(storage, name, between))
    except Damaged as error:
        return str(error)
    return None


def write_safetensors(
    storage: Storage,
    job: str,
    chosen: Contents,
    target: Path,
    between: Between,
    *,
    with_optimizer: bool,
) -> Exported:
    """The weights under the names that the model's `state_dict` has; with the optimizer, its
    tensors under ``optimizer.…`` besides, and its groups of parameters in the metadata."""
    named = {".".join(t.path[1:]): t for t in chosen.tensors if t.path[0] == MODEL}
    if not named:
        raise Refused(f"{chosen.entry.name} holds no model that a Session saved")
    metadata = {**_origin(job, chosen.manifest), "format": "pt"}
    if with_optimizer:
        named |= {".".join(t.path): t for t in chosen.tensors if t.path[0] == OPTIMIZER}
        plain = contents.without_tensors(chosen.manifest.state).get(OPTIMIZER) or {}
        metadata[OPTIMIZER] = json.dumps({k: v for k, v in plain.items() if k != "state"})
    size = _mapped(
        lambda: export(storage, chosen.manifest, named, metadata, target, between=between)
    )
    return Exported(chosen.entry, size, len(named))


def gang(storage: Storage, attempt: int) -> wire.Gang | None:
    """``gang.json`` when it belongs to this attempt and can be read."""
    try:
        found: wire.Gang = wire.Gang.from_dict(json.loads(storage.read(wire.GANG_KEY)))
    except (StorageError, ValueError, TypeError):
        return None
    return found if found.attempt == attempt else None


def _whole(storage: Storage, name: str, between: Between) -> None:
    """Raises `DamagedCheckpoint`."""
    try:
        verify(storage, name, between=between)
    except UnreadableCheckpoint:
        raise
    except DamagedCheckpoint:
        heads.set_verified(storage, name, verified=False)
        raise
    heads.set_verified(storage, name, verified=True)


def _origin(job: str, manifest: Manifest) -> Mapping[str, str]:
    return {
        "job": job,
        "checkpoint": manifest.name,
        "step": str(manifest.step),
        "epoch": str(manifest.epoch),
        "values": json.dumps(dict(manifest.values)),
        "torch": manifest.torch,
    }


def _mapped(read: Callable[[], T]) -> T:
    try:
        return read()
    except heads.UnknownCheckpoint as error:
        raise Refused(str(error)) from error
    except (DamagedCheckpoint, heads.DamagedHead) as error:
        raise Damaged(str(error)) from error
    except StorageError as error:
        raise InfrastructureError(str(error)) from error
