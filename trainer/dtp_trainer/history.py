"""The metrics of a job as compact objects in its storage: ``metrics/<level>-….jsonl.gz``.

A chunk is records as workers print them, between lines that say of which attempt they are, all
gzipped. Level 0 holds what the leader heard, about five minutes each. Of a full level the oldest
chunks become one of the next level, thinned: of each stretch of time the lowest and highest of
every number stay, so that no spike is lost. So a week is some dozens of objects, and the last hour
is as it was.

The leader writes. Clients read everything and then, from the workers' logs, what came later.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from dtp_trainer import wire
from dtp_trainer.measures import measured, used
from dtp_trainer.storage import NotFound, Storage, StorageError

FOLDER = "metrics"
CHUNK_S = 300.0
CHUNK_RECORDS = 4000
FAN = 12
"""So many chunks become one, once a level holds twice as many."""
GROUPS = 240
"""Stretches of a thinned chunk, of each of which the extremes are kept."""
WORKER_GROUPS = 60
"""The same for what is known of single workers."""
WORKER_EVERY_S = 5.0
_NAMES = 24
_LONGEST_BACKLOG = 5 * CHUNK_RECORDS
_EVENTS = 240
"""Of each name in a thinned chunk."""


class Told(NamedTuple):
    """A record, its attempt, and the line that says it."""

    attempt: int
    record: wire.Record
    line: str


Stream: TypeAlias = tuple[str, int]
"""Kind of record and worker: what comes in the order of time."""


@dataclass(frozen=True, slots=True)
class Past:
    """All that the history holds."""

    told: Sequence[Told] = ()
    """Coarse first where levels meet; in the order of time within a chunk."""
    until: Mapping[Stream, float] = field(default_factory=dict)
    """Time of the newest record of each stream; what is newer is in the logs alone."""

    @property
    def since(self) -> float | None:
        """From when on logs have to be read; None: from their beginning."""
        return max(self.until.values()) - 60.0 if self.until else None

    def holds(self, record: wire.Record) -> bool:
        """Whether a record from a log is in here, or thinned away."""
        if not isinstance(record, (wire.Window, wire.Host)):
            return False
        return record.at <= self.until.get((record.kind, record.worker), -math.inf)


# --------------------------------------------------------------------------------------- reading


def read(storage: Storage) -> Past:
    """What cannot be read, or is no chunk, is passed over.

    Raises:
        StorageError: nothing can be listed.
    """
    told: list[Told] = []
    covered: set[str] = set()
    for name in sorted(_names(storage), key=lambda name: (-_level(name), name)):
        if name in covered:
            continue
        chunk = _load(storage, name)
        if chunk is None or covered.intersection(chunk.sources):
            continue
        covered.update(chunk.sources)
        told += chunk.told
    return Past(told, _newest(told))


def _newest(told: Iterable[Told]) -> dict[Stream, float]:
    until: dict[Stream, float] = {}
    for _, record, _ in told:
        if isinstance(record, (wire.Window, wire.Host)):
            stream = (record.kind, record.worker)
            until[stream] = max(record.at, until.get(stream, -math.inf))
    return until


def _names(storage: Storage) -> list[str]:
    keys = [entry.key.removeprefix(f"{FOLDER}/") for entry in storage.list(f"{FOLDER}/")]
    return [key for key in keys if key.endswith(".jsonl.gz") and key.partition("-")[0].isdigit()]


def _level(name: str) -> int:
    return int(name.partition("-")[0])


@dataclass(frozen=True, slots=True)
class Chunk:
    told: Sequence[Told]
    sources: tuple[str, ...] = ()
    """Names of the chunks that this one stands for."""


def encode(chunk: Chunk) -> bytes:
    lines = [json.dumps({"sources": chunk.sources})]
    attempt = -1
    for one in chunk.told:
        if one.attempt != attempt:
            attempt = one.attempt
            lines.append(json.dumps({"attempt": attempt}))
        lines.append(one.line)
    return gzip.compress("\n".join([*lines, ""]).encode(), compresslevel=6, mtime=0)


def decode(data: bytes) -> Chunk:
    """Raises `ValueError` for what is no chunk."""
    try:
        first, *lines = gzip.decompress(data).decode().splitlines()
        sources = tuple(str(name) for name in json.loads(first)["sources"])
        return Chunk([*_told(lines)], sources)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a chunk of metrics: {error}") from error


def _told(lines: Iterable[str]) -> Iterator[Told]:
    attempt = 0
    for line in lines:
        if line.startswith('{"attempt"'):
            attempt = int(json.loads(line)["attempt"])
            continue
        record = wire.parse(line)
        if record is not None and not isinstance(record, wire.Text):
            yield Told(attempt, record, line)


def _load(storage: Storage, name: str) -> Chunk | None:
    """None when it is gone, or no chunk."""
    with contextlib.suppress(StorageError, ValueError):
        return decode(storage.read(f"{FOLDER}/{name}"))
    return None


# --------------------------------------------------------------------------------------- writing


class HistoryWriter:
    """One a leader; blocking, used by one thread at a time."""

    def __init__(self, storage: Storage, *, attempt: int, term: int) -> None:
        self._storage, self._attempt, self._term = storage, attempt, term
        self._chunk: list[Told] = []
        self._count = 0
        self._taken: dict[Stream, float] = {}

    def write(self, records: Iterable[wire.Record]) -> None:
        """Add them to the chunk that is being written, which is durable then.

        Raises:
            StorageError: it is not; the records are kept for the next call.
        """
        taken = (record for record in records if self._takes(record))
        self._chunk += [Told(self._attempt, record, wire.encode(record)) for record in taken]
        del self._chunk[:-_LONGEST_BACKLOG]  # of storage that was away for hours
        if not self._chunk:
            return
        name = f"{self._attempt}.{self._term}.{self._count}"
        self._put(0, name, Chunk(self._chunk))
        age = self._chunk[-1].record.at - self._chunk[0].record.at
        if age >= CHUNK_S or len(self._chunk) >= CHUNK_RECORDS:
            self._chunk = []
            self._count += 1
            self._roll_up()

    def _takes(self, record: wire.Record) -> bool:
        """Each window of rank 0; of other streams one in a few seconds."""
        if isinstance(record, (wire.GangEvent, wire.Exit)):
            return isinstance(record, wire.GangEvent)
        stream = (record.kind, record.worker)
        every = 0.0 if isinstance(record, wire.Window) and record.rank == 0 else WORKER_EVERY_S
        last = self._taken.get(stream, -math.inf)
        if record.at <= last or record.at - last < every:
            return False
        self._taken[stream] = record.at
        return True

    def _put(self, level: int, name: str, chunk: Chunk) -> str:
        first_ms = round(min(one.record.at for one in chunk.told) * 1000)
        key = f"{level}-{first_ms:014d}-{name}.jsonl.gz"
        self._storage.write(f"{FOLDER}/{key}", encode(chunk))
        return key

    def _roll_up(self) -> None:
        names = sorted(_names(self._storage))
        level = 0
        while any(_level(name) >= level for name in names):
            of = [name for name in names if _level(name) == level]
            if len(of) >= 2 * FAN:
                names.append(self._merge(level + 1, of[:FAN]))
            level += 1

    def _merge(self, level: int, names: Sequence[str]) -> str:
        """Old and new lie there for a moment; readers know which stand for which."""
        chunks = [_load(self._storage, name) for name in names]
        told = thinned([one for chunk in chunks if chunk is not None for one in chunk.told])
        label = f"{self._attempt}.{self._term}.{self._count}"
        merged = self._put(level, label, Chunk(told, tuple(names))) if told else ""
        for name in names:
            with contextlib.suppress(NotFound):
                self._storage.delete(f"{FOLDER}/{name}")
        return merged


# -------------------------------------------------------------------------------------- thinning


def thinned(told: Sequence[Told]) -> list[Told]:
    """Some of them, in their order: the extremes of each number in each stretch of time."""
    streams: dict[tuple[str, int | str], list[int]] = {}
    for index, (_, record, _) in enumerate(told):
        streams.setdefault(_stream(record), []).append(index)
    kept: set[int] = set()
    for (kind, of), found in streams.items():
        if kind == wire.GangEvent.kind:
            kept.update(found[:: max(1, math.ceil(len(found) / _EVENTS))])
            continue
        groups = GROUPS if (kind, of) == (wire.Window.kind, "job") else WORKER_GROUPS
        numbers = {index: _numbers(told[index].record) for index in found}
        for group in _split(found, groups):
            kept.update(_extremes(group, numbers))
    return [told[index] for index in sorted(kept)]


def _stream(record: wire.Record) -> tuple[str, int | str]:
    match record:
        case wire.GangEvent():
            return record.kind, record.name
        case wire.Window():
            return record.kind, "job" if record.rank == 0 else record.worker
        case _:
            return record.kind, record.worker


def _numbers(record: wire.Record) -> dict[str, float]:
    """Those by which a record may be worth keeping."""
    match record:
        case wire.Window(rank=0):
            found = {n: v for n, v in measured(record).items() if not n.startswith("job/")}
            return dict([*found.items()][:_NAMES])
        case wire.Window():
            return {n: v for n, v in measured(record).items() if n == "time/step_ms"}
        case wire.Host():
            return dict([*used(record).items()][:_NAMES])
        case _:
            return {}


def _split(found: Sequence[int], groups: int) -> Iterator[Sequence[int]]:
    size = max(1, math.ceil(len(found) / groups))
    for start in range(0, len(found), size):
        yield found[start : start + size]


def _extremes(group: Sequence[int], numbers: Mapping[int, Mapping[str, float]]) -> set[int]:
    kept = {group[-1]}
    for name in {name for index in group for name in numbers[index]}:
        of = sorted((_sortable(numbers[i][name]), i) for i in group if name in numbers[i])
        kept.update((of[0][1], of[-1][1]))
    return kept


def _sortable(value: float) -> float:
    return math.inf if math.isnan(value) else value
