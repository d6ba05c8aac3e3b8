"""``checkpoints/head.json``: the fence between generations and the list of checkpoints that exist.

Every change is one compare-and-set, tried again on the newest content when another writer was
faster. Free of torch, so that the agent raises the fence and the engine pins and chooses with the
same functions by which a rank commits.
"""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtp_trainer.storage import Conflict, NotFound, Storage, StorageError
from dtp_trainer.wire import HEAD_KEY, CheckpointEntry, CheckpointHead, encode_object

FOLDER = "checkpoints"
_CHANGE_WITHIN_S = 60.0
_NAME = re.compile(r"step-(\d+)\.g(\d+)")


class Fenced(Exception):
    """A newer generation owns the job: whoever sees this must stop and leave no trace."""


class DamagedHead(StorageError):
    """``head.json`` is not what a commit wrote; the message begins with it and says what to do."""


class UnknownCheckpoint(StorageError):
    """No checkpoint of that name or step; the message says which there are."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What outlives the next commit."""

    keep: int = 3
    """The newest so many; at least two are kept whatever it says."""
    keep_best: str | None = None
    """Name of a reported value whose best checkpoint is kept besides."""

    @classmethod
    def from_dict(cls, policy: Mapping[str, Any]) -> Retention:
        """From the JSON in ``DTP_CHECKPOINT``; what is missing has its default."""
        return cls(keep=int(policy.get("keep") or cls().keep), keep_best=policy.get("keep_best"))


# ------------------------------------------------------------------------- reading and changing


def read_head(storage: Storage) -> CheckpointHead:
    """The head; an empty one when no generation was started yet. Raises `DamagedHead`."""
    return _read(storage)[0]


def change_head(
    storage: Storage, change: Callable[[CheckpointHead], CheckpointHead]
) -> CheckpointHead:
    """Replace the head by `change` of it; the head as it then is.

    `change` may be called several times and must have no effects; what it raises passes through.
    """
    deadline = time.monotonic() + _CHANGE_WITHIN_S
    while True:
        head, tag = _read(storage)
        changed = change(head)
        if changed == head:
            return head
        try:
            storage.write_if(HEAD_KEY, encode_object(changed), tag=tag)
        except Conflict:
            if time.monotonic() > deadline:
                raise
        else:
            return changed


def _read(storage: Storage) -> tuple[CheckpointHead, str | None]:
    try:
        found = storage.read_tagged(HEAD_KEY)
    except NotFound:
        return CheckpointHead(), None
    try:
        head: CheckpointHead = CheckpointHead.from_dict(json.loads(found.data))
    except (ValueError, TypeError, AttributeError):
        raise DamagedHead(
            f"{HEAD_KEY} in {storage.uri} is damaged: restore it from a copy, or remove it to "
            "begin at step 0"
        ) from None
    return head, found.tag


# ------------------------------------------------------------------------------------- the fence


def raise_generation(storage: Storage) -> CheckpointHead:
    """Start the next generation: from here on, no older one can commit.

    The `generation` of the head that is returned belongs to the caller alone.
    """
    return change_head(storage, lambda head: replace(head, generation=head.generation + 1))


def check_fence(head: CheckpointHead, generation: int) -> None:
    """Raises `Fenced` when a newer generation than `generation` was started."""
    if head.generation > generation:
        raise Fenced(
            f"generation {generation} was replaced by generation {head.generation}; "
            "its checkpoints are refused"
        )


def commit(storage: Storage, entry: CheckpointEntry) -> CheckpointHead:
    """Make `entry` exist and the next generation start from it.

    Raises:
        Fenced: a newer generation was started; nothing was changed.
    """

    def change(head: CheckpointHead) -> CheckpointHead:
        check_fence(head, entry.generation)
        others = tuple(e for e in head.entries if e.name != entry.name)
        return CheckpointHead(entry.generation, entry.name, (*others, entry))

    return change_head(storage, change)


# ------------------------------------------------------------------------------- people's changes


def pin(storage: Storage, name_or_step: str, *, pinned: bool = True) -> CheckpointEntry:
    """Keep a checkpoint for good, or no longer. Raises `UnknownCheckpoint`."""
    return _change_entry(storage, name_or_step, pinned=pinned)


def set_resume(storage: Storage, name_or_step: str) -> CheckpointEntry:
    """Let the next generation start from this checkpoint. Raises `UnknownCheckpoint`."""

    def change(head: CheckpointHead) -> CheckpointHead:
        return replace(head, resume=find(head, name_or_step).name)

    return find(change_head(storage, change), name_or_step)


def set_verified(storage: Storage, name: str, *, verified: bool) -> CheckpointHead:
    """Note the outcome of a check of every hash; a checkpoint that is gone is no error."""

    def change(head: CheckpointHead) -> CheckpointHead:
        return _with_entries(
            head,
            (replace(e, verified=verified) if e.name == name else e for e in head.entries),
        )

    return change_head(storage, change)


def find(head: CheckpointHead, name_or_step: str) -> CheckpointEntry:
    """By name or step number; of several with one step, that of the newest generation.

    Raises:
        UnknownCheckpoint: there is none; the message names what there is.
    """
    found = [e for e in head.entries if name_or_step in (e.name, str(e.step))]
    if found:
        return max(found, key=_age)
    names = [e.name for e in head.entries]
    if not names:
        raise UnknownCheckpoint(f"no checkpoint {name_or_step!r}: the job has none yet")
    near = difflib.get_close_matches(name_or_step, names, n=1) or names[-1:]
    steps = ", ".join(str(e.step) for e in head.entries)
    raise UnknownCheckpoint(
        f"no checkpoint {name_or_step!r}: there are steps {steps}; did you mean {near[0]}?"
    )


def _change_entry(storage: Storage, name_or_step: str, *, pinned: bool) -> CheckpointEntry:
    def change(head: CheckpointHead) -> CheckpointHead:
        chosen = find(head, name_or_step).name
        return _with_entries(
            head,
            (replace(e, pinned=pinned) if e.name == chosen else e for e in head.entries),
        )

    return find(change_head(storage, change), name_or_step)


# ------------------------------------------------------------------------- what is used, and kept


def candidates(head: CheckpointHead) -> tuple[CheckpointEntry, ...]:
    """In the order in which a start tries them: the resume point, those before it, the rest.

    Newest first by (generation, step); those known to be damaged last.
    """
    ordered = sorted(head.entries, key=_age, reverse=True)
    names = [e.name for e in ordered]
    start = names.index(head.resume) if head.resume in names else 0
    turned = ordered[start:] + ordered[:start]
    return tuple(sorted(turned, key=lambda entry: entry.verified is False))


def surplus(head: CheckpointHead, retention: Retention) -> tuple[CheckpointEntry, ...]:
    """The checkpoints that retention gives up, oldest first.

    Kept are the newest ones, the best one, pinned ones, the resume point, and the newest two that
    are known to be whole. Those known to be damaged count for nothing, and go unless pinned.
    """
    sound = [e for e in head.entries if e.verified is not False]
    kept = _kept(head, retention) | {e.name for e in [e for e in sound if e.verified][-2:]}
    return tuple(e for e in head.entries if e.name not in kept)


def to_verify(head: CheckpointHead, retention: Retention) -> CheckpointEntry | None:
    """The checkpoint to read back before anything may be given up.

    None when nothing is to go, or when two of those that stay are known to be whole.
    """
    kept = _kept(head, retention)
    staying = [e for e in head.entries if e.name in kept and e.verified is not False]
    unsure = [e for e in staying if not e.verified]
    enough = len(staying) - len(unsure) >= 2
    return None if enough or len(kept) == len(head.entries) or not unsure else unsure[-1]


def _kept(head: CheckpointHead, retention: Retention) -> set[str]:
    sound = [e for e in head.entries if e.verified is not False]
    kept = {e.name for e in sound[-max(retention.keep, 2) :]}
    kept |= {e.name for e in head.entries if e.pinned or e.name == head.resume}
    best = best_entry(sound, retention.keep_best)
    return kept | {best.name} if best else kept


def best_entry(entries: Sequence[CheckpointEntry], value: str | None) -> CheckpointEntry | None:
    """The entry with the best `value`; names that hold "loss" or "error" are better when smaller.

    Of equals the newest; values that are not numbers (NaN) never win.
    """
    rated = [
        (e.values[value], e)
        for e in entries
        if value is not None and value in e.values and e.values[value] == e.values[value]
    ]
    if not rated or value is None:
        return None
    sign = -1.0 if re.search("loss|error", value, re.IGNORECASE) else 1.0
    return max(reversed(rated), key=lambda pair: sign * pair[0])[1]


def drop(storage: Storage, names: Sequence[str], *, generation: int) -> CheckpointHead:
    """Take checkpoints off the list; those pinned or chosen meanwhile stay. Raises `Fenced`."""

    def change(head: CheckpointHead) -> CheckpointHead:
        check_fence(head, generation)
        return _with_entries(
            head,
            (e for e in head.entries if e.name not in names or e.pinned or e.name == head.resume),
        )

    return change_head(storage, change)


def parse_name(name: str) -> tuple[int, int] | None:
    """(generation, step) of a checkpoint folder's name; None for any other name."""
    found = _NAME.fullmatch(name)
    return (int(found[2]), int(found[1])) if found else None


def _age(entry: CheckpointEntry) -> tuple[int, int]:
    return entry.generation, entry.step


def _with_entries(head: CheckpointHead, entries: Iterable[CheckpointEntry]) -> CheckpointHead:
    return replace(head, entries=tuple(entries))
