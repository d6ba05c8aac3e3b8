"""What a job has in its storage, as clients read it: its checkpoints, and the gang's last word.

Blocking; the trainer's errors become ours here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from dtp_engine.errors import InfrastructureError, Refused
from dtp_trainer import wire
from dtp_trainer.checkpoints import heads
from dtp_trainer.storage import Storage, StorageError

T = TypeVar("T")


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


def gang(storage: Storage, attempt: int) -> wire.Gang | None:
    """``gang.json`` when it belongs to this attempt and can be read."""
    try:
        found: wire.Gang = wire.Gang.from_dict(json.loads(storage.read(wire.GANG_KEY)))
    except (StorageError, ValueError, TypeError):
        return None
    return found if found.attempt == attempt else None


def _mapped(read: Callable[[], T]) -> T:
    try:
        return read()
    except heads.UnknownCheckpoint as error:
        raise Refused(str(error)) from error
    except StorageError as error:
        raise InfrastructureError(str(error)) from error
