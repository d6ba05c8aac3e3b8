"""Who leads the gang: one object, ``gang.json``, decides, by compare-and-set."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TypeAlias

from dtp_trainer.storage import NotFound, Storage
from dtp_trainer.wire import GANG_KEY, ExitCode, Gang, GangEvent, GangPhase, Member, encode_object


@dataclass(frozen=True, slots=True)
class Sight:
    """``gang.json`` as it was read; `gang` is None when there is none, or none that can be read."""

    gang: Gang | None
    tag: str | None


@dataclass(frozen=True, slots=True)
class Led:
    """Somebody leads this attempt, at this address."""

    address: str


@dataclass(frozen=True, slots=True)
class Vacant:
    """This attempt has no leader yet."""


@dataclass(frozen=True, slots=True)
class Over:
    """Nothing is left to do for a worker of this attempt but to exit."""

    code: int
    reason: str


Verdict: TypeAlias = Led | Vacant | Over


@dataclass(frozen=True, slots=True)
class Mandate:
    """The right to write ``gang.json``, as long as its content is still the one named by `tag`."""

    attempt: int
    term: int
    worker: int
    address: str
    tag: str


def look(storage: Storage) -> Sight:
    """
    Raises:
        StorageError: it could not be read.
    """
    try:
        found = storage.read_tagged(GANG_KEY)
    except NotFound:
        return Sight(None, None)
    try:
        gang: Gang = Gang.from_dict(json.loads(found.data))
    except (ValueError, TypeError, AttributeError):
        return Sight(None, found.tag)
    return Sight(gang if _sound(gang) else None, found.tag)


def _sound(gang: Gang) -> bool:
    """What leaders count with is numbers."""
    counted = (gang.attempt, gang.term, gang.leader, gang.generation, gang.leader_errors)
    events = all(isinstance(e, GangEvent) and isinstance(e.seq, int) for e in gang.events)
    members = all(isinstance(member, Member) for member in gang.members)
    return events and members and all(isinstance(number, int) for number in counted)


def judge(gang: Gang | None, attempt: int) -> Verdict:
    """What ``gang.json`` means to a worker of this attempt."""
    if gang is None or gang.attempt < attempt:
        return Vacant()
    if gang.attempt > attempt:
        return Over(ExitCode.FENCED, f"attempt {gang.attempt} replaced attempt {attempt}")
    if gang.phase == GangPhase.ENDED:
        return Over(ExitCode.FAILED if gang.outcome is None else gang.outcome, gang.detail)
    return Led(gang.address)


def take_office(
    storage: Storage, sight: Sight, *, attempt: int, worker: int, address: str
) -> Mandate:
    """Become leader in the next term, if nobody else did since `sight`.

    The object says nothing new but who leads, so a leader that dies at once loses nothing.

    Raises:
        Conflict: somebody else was faster.
        StorageError: it could not be written.
    """
    old = sight.gang or Gang(attempt, 0, worker, address, GangPhase.FORMING, 0, 0.0)
    elected = replace(
        _afresh(old, attempt) if old.attempt != attempt else old,
        term=old.term + 1,
        leader=worker,
        address=address,
        phase=GangPhase.FORMING,
        updated=time.time(),
    )
    tag = storage.write_if(GANG_KEY, encode_object(elected), tag=sight.tag)
    return Mandate(attempt, elected.term, worker, address, tag)


def _afresh(old: Gang, attempt: int) -> Gang:
    """What an older attempt leaves to this one: its numbers, not its members and budgets."""
    return replace(
        old,
        attempt=attempt,
        members=(),
        world_size=0,
        restarts=0,
        errors_used=0,
        hangs_used=0,
        leader_errors=0,
        leader_error="",
        outcome=None,
        detail="",
    )
