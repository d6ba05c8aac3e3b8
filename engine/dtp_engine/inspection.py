"""Looking into a job: profiles on command, where the ranks of a hang stood, why a rank failed.

What touches storage blocks; the trainer's errors become ours here.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from dtp_engine.backend import LogLine
from dtp_engine.errors import InfrastructureError, Refused
from dtp_trainer import wire
from dtp_trainer.inspection import STACKS, WISH_KEY, Ask, Profiled, answer_key, stack_of
from dtp_trainer.storage import Conflict, NotFound, Storage, StorageError, Tagged

T = TypeVar("T")

KEPT_LINES = 400
"""Of a rank that failed: enough for a traceback and what came before it."""
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = re.compile(r"^(During handling of the above|The above exception was)")
_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch's own, on each line of a traceback

# ----------------------------------------------------------------------------------------- profiles


def wish(storage: Storage, ask: Ask, now: float) -> None:
    """Leave it for the leader. Raises `Refused` while another one is open."""

    def leave() -> None:
        found = _open_wish(storage)
        if found is not None and (other := _decoded(found.data)) and other.until > now:
            raise Refused(f"another profile is under way, asked for by {other.by}; try again soon")
        data = json.dumps(ask.to_dict()).encode()
        storage.write_if(WISH_KEY, data, tag=found.tag if found else None)

    try:
        _mapped(leave)
    except Conflict:
        raise Refused("another profile was asked for this very moment; try again soon") from None


def withdraw(storage: Storage, ask: Ask, ranks: Iterable[int]) -> None:
    """The wish and its answers; what was recorded stays."""

    def remove() -> None:
        found = _open_wish(storage)
        if found is not None and (open_ := _decoded(found.data)) and open_.id == ask.id:
            storage.delete(WISH_KEY)
        for rank in ranks:
            storage.delete(answer_key(ask.id, rank))

    _mapped(remove)


def answer(storage: Storage, ask: Ask, rank: int) -> Profiled | None:
    """None as long as there is none."""
    with suppress(NotFound, ValueError, TypeError):
        data = _mapped(lambda: storage.read(answer_key(ask.id, rank)))
        found: Profiled = Profiled.from_dict(json.loads(data))
        return found
    return None


def recorded(storage: Storage, key: str) -> bytes:
    """A file of a profile."""
    return _mapped(lambda: storage.read(key))


def _open_wish(storage: Storage) -> Tagged | None:
    try:
        return storage.read_tagged(WISH_KEY)
    except NotFound:
        return None


def _decoded(data: bytes) -> Ask | None:
    with suppress(ValueError, TypeError):
        found: Ask = Ask.from_dict(json.loads(data))
        return found
    return None


# ------------------------------------------------------------------------------------------- stacks


@dataclass(frozen=True, slots=True)
class Stack:
    """Where one rank of a hang stood."""

    generation: int
    rank: int
    lines: tuple[str, ...]


def stacks(storage: Storage) -> tuple[Stack, ...]:
    """Of the newest hang, by rank; none when no rank ever hung."""

    def read() -> tuple[Stack, ...]:
        found = {entry.key: stack_of(entry.key) for entry in storage.list(STACKS)}
        places = {place: key for key, place in found.items() if place is not None}
        newest = max((generation for generation, _ in places), default=0)
        return tuple(
            Stack(generation, rank, tuple(_text(storage, places[generation, rank]).splitlines()))
            for generation, rank in sorted(places)
            if generation == newest
        )

    return _mapped(read)


def _text(storage: Storage, key: str) -> str:
    return storage.read(key).decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------- failures


@dataclass(frozen=True, slots=True)
class Failure:
    """Of the rank that failed first, in the newest generation that failed."""

    rank: int
    worker: int | None
    generation: int
    step: int | None
    text: str
    traceback: tuple[str, ...]
    """The last one that it wrote; empty when it wrote none."""
    lines: tuple[str, ...]
    """What it wrote last, oldest first, without the traceback."""


def failed_rank(gang: wire.Gang | None) -> wire.GangEvent | None:
    """The event that names it."""
    events = gang.events if gang else ()
    told = [event for event in events if event.name == "rank_failed" and event.rank is not None]
    return told[-1] if told else None


def began_at(gang: wire.Gang | None, generation: int) -> float:
    """Unix time; 0 when nobody remembers."""
    events = gang.events if gang else ()
    of_it = (event.at for event in events if event.generation == generation)
    return min(of_it, default=0.0)


async def failure(
    event: wire.GangEvent,
    lines: AsyncIterator[tuple[int, LogLine]],
    *,
    since: float,
    shown: int,
) -> Failure:
    """From the lines of the attempt: those of the rank in the generation that began at `since`, of
    which at most `shown` beside the traceback are kept."""
    source = f"rank{event.rank}"
    kept: deque[wire.Text] = deque(maxlen=KEPT_LINES)
    async for _, line in lines:
        text = line.text
        if text is None or text.source != source:
            continue
        if since <= text.at <= event.at + 1:
            kept.append(_without_prefix(text))
    trace = _traceback(kept)
    rest = [line.text for at, line in enumerate(kept) if at not in trace]
    return Failure(
        rank=event.rank or 0,
        worker=event.worker,
        generation=event.generation,
        step=event.step,
        text=event.text,
        traceback=tuple(line.text for at, line in enumerate(kept) if at in trace),
        lines=tuple(rest[-shown:] if shown else ()),
    )


def _without_prefix(line: wire.Text) -> wire.Text:
    return replace(line, text=_PREFIX.sub("", line.text)) if line.stream == "err" else line


def _traceback(lines: Iterable[wire.Text]) -> frozenset[int]:
    """Numbers of the lines of the last one, with those of the exceptions that led to it."""
    errors = [(at, line.text) for at, line in enumerate(lines) if line.stream == "err"]
    starts = [at for at, (_, text) in enumerate(errors) if text == _TRACEBACK]
    if not starts:
        return frozenset()
    end = _end_of_traceback([text for _, text in errors], starts[-1])
    start = starts.pop()
    while starts and any(_CHAINED.search(text) for _, text in errors[max(start - 3, 0) : start]):
        start = starts.pop()
    return frozenset(at for at, _ in errors[start:end])


def _end_of_traceback(lines: Sequence[str], start: int) -> int:
    """After the line that names the error."""
    named = (at for at in range(start + 1, len(lines)) if not lines[at].startswith(" "))
    return min(next(named, len(lines)) + 1, len(lines))


def _mapped(call: Callable[[], T]) -> T:
    """Raises `NotFound` and `Conflict` as they are."""
    try:
        return call()
    except (NotFound, Conflict):
        raise
    except StorageError as error:
        raise InfrastructureError(str(error)) from error
