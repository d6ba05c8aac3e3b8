"""Which checkpoints of a job exist, and what an operator may say of them; reads and changes
``head.json`` only."""

from __future__ import annotations

import contextlib
import dataclasses
import json

from dtp_engine.errors import InfrastructureError, Refused
from dtp_trainer import wire
from dtp_trainer.storage import Conflict, NotFound, Storage, StorageError

_TRIES = 20
"""A commit by the training job may come between reading the head and changing it; each try reads
again."""


def newest(head: wire.CheckpointHead) -> wire.CheckpointEntry | None:
    """The one from which the next generation starts."""
    named = [entry for entry in head.entries if entry.name == head.resume]
    ordered = sorted(head.entries, key=lambda entry: (entry.generation, entry.step))
    return named[0] if named else ordered[-1] if ordered else None


def read_head(storage: Storage) -> wire.CheckpointHead:
    """Empty before the first checkpoint. Blocking."""
    return _read_tagged(storage)[0]


def read_gang(storage: Storage, attempt: int) -> wire.Gang | None:
    """``gang.json`` when it belongs to this attempt. Blocking."""
    try:
        gang: wire.Gang = wire.Gang.from_dict(json.loads(storage.read(wire.GANG_KEY)))
    except (StorageError, ValueError, TypeError):
        return None
    return gang if gang.attempt == attempt else None


def choose(head: wire.CheckpointHead, name_or_step: str) -> wire.CheckpointEntry:
    """By name, or by step (the newest commit of that step). Raises `Refused` with what there is."""
    wanted = int(name_or_step) if name_or_step.isdigit() else None
    for entry in reversed(head.entries):
        if entry.name == name_or_step or entry.step == wanted:
            return entry
    steps = ", ".join(str(entry.step) for entry in head.entries[-8:])
    there = f"there are: {steps}" if steps else "the job has none yet"
    raise Refused(f"no checkpoint {name_or_step}; {there}")


def pin(storage: Storage, name_or_step: str, *, pinned: bool) -> wire.CheckpointEntry:
    """Keep a checkpoint whatever the retention says, or give it back. Blocking."""
    for _ in range(_TRIES):
        head, tag = _read_tagged(storage)
        entry = dataclasses.replace(choose(head, name_or_step), pinned=pinned)
        entries = tuple(entry if old.name == entry.name else old for old in head.entries)
        changed = wire.encode_object(dataclasses.replace(head, entries=entries))
        with contextlib.suppress(Conflict):
            storage.write_if(wire.HEAD_KEY, changed, tag=tag)
            return entry
    raise InfrastructureError(f"checkpoint {name_or_step} could not be changed; try again")


def _read_tagged(storage: Storage) -> tuple[wire.CheckpointHead, str | None]:
    try:
        tagged = storage.read_tagged(wire.HEAD_KEY)
        return wire.CheckpointHead.from_dict(json.loads(tagged.data)), tagged.tag
    except NotFound:
        return wire.CheckpointHead(), None
    except (StorageError, ValueError, TypeError) as error:
        raise InfrastructureError(f"cannot read the checkpoints of the job: {error}") from error
