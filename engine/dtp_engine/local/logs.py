"""Log files of workers, read as they grow: whole lines, with the byte offset behind each as its
cursor. Blocking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from dtp_engine import logs
from dtp_engine.backend import LogLine, Since
from dtp_engine.local.folders import WorkerFolder
from dtp_trainer import wire

_CHUNK_BYTES = 1 << 18
_LOOK_BYTES = 1 << 17
_LINE_BYTES = 1 << 24
"""A line that is longer is cut, so that a worker that writes none costs bounded memory."""


@dataclass(slots=True)
class Tail:
    """One worker's log file, from an offset on."""

    worker: int
    path: Path
    offset: int = 0
    """Behind the last line that was taken."""
    at: float | None = None
    """Time of the last line that had one, for those without."""

    def lines(self) -> Iterator[LogLine]:
        """The whole lines that are there now. A file that became shorter is read from its start."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            size = file.seek(0, 2)
            if size < self.offset:
                self.offset = 0
            file.seek(self.offset)
            rest = b""
            while self.offset + len(rest) < size:
                chunk = file.read(min(_CHUNK_BYTES, size - self.offset - len(rest)))
                if not chunk:
                    return
                *whole, rest = (rest + chunk).split(b"\n")
                for raw in whole:
                    yield self._line(raw, len(raw) + 1)
                if len(rest) > _LINE_BYTES:
                    yield self._line(rest, len(rest))
                    rest = b""

    def _line(self, raw: bytes, length: int) -> LogLine:
        self.offset += length
        text = raw.decode(errors="replace").removesuffix("\r")
        parsed = wire.parse(text)
        if parsed is None:
            if self.at is None:
                self.at = self.path.stat().st_mtime
            parsed = wire.Text(self.at, f"worker{self.worker}", "err", text)
        self.at = parsed.at
        cursor = str(self.offset)
        if isinstance(parsed, wire.Text):
            return LogLine(self.worker, cursor, parsed, None)
        return LogLine(self.worker, cursor, None, parsed)


@dataclass(slots=True)
class Feed:
    """The logs of an attempt's workers as one, in the order of time; more workers may come."""

    workers: Callable[[], list[WorkerFolder]]
    offsets: dict[int, int] = field(default_factory=dict)
    since: Since | None = None
    _tails: dict[int, Tail] = field(default_factory=dict)
    _round: Iterator[LogLine] | None = None

    def read(self, limit: int) -> list[LogLine]:
        """The next lines. Fewer than `limit` when all was read that was there when this round of
        reads began; the read after that begins another. Raises `OSError`."""
        if self._round is None:
            self._round = logs.merge(tail.lines() for tail in self._find_tails())
        lines = list(islice(self._round, limit))
        if len(lines) < limit:
            self._round = None
        return lines

    def _find_tails(self) -> list[Tail]:
        for folder in self.workers():
            if folder.worker not in self._tails:
                offset = self._offset(folder)
                self._tails[folder.worker] = Tail(folder.worker, folder.log, offset)
        return list(self._tails.values())

    def _offset(self, folder: WorkerFolder) -> int:
        known = self.offsets.get(folder.worker)
        if known is not None or self.since is None:
            return known or 0
        return beginning(folder.log, self.since)


def beginning(path: Path, since: Since) -> int:
    """Where to begin to read a log; found by halves, for its lines are in the order of time.

    Raises `OSError`, but for a file that is not there yet.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return 0
    with file:
        low, high = 0, file.seek(0, 2)
        if (newest := _time_at(file, max(0, high - _LOOK_BYTES))) is not None:
            low = max(0, high - _LOOK_BYTES) if newest < since.at else low
        while high - low > _LOOK_BYTES:
            middle = (low + high) // 2
            at = _time_at(file, middle)
            low, high = (middle, high) if at is not None and at < since.at else (low, middle)
        return _line_start(file, max(0, low - since.context_bytes))


def _time_at(file: BinaryIO, offset: int) -> float | None:
    """Of the first line that has one and begins behind `offset`."""
    file.seek(offset)
    for raw in file.read(_LOOK_BYTES).split(b"\n")[1:-1]:
        if (parsed := wire.parse(raw.decode(errors="replace"))) is not None:
            return parsed.at
    return None


def _line_start(file: BinaryIO, offset: int) -> int:
    """The beginning of the line that `offset` lies in or, of a very long one, `offset`."""
    start = max(0, offset - _LOOK_BYTES)
    file.seek(start)
    before = file.read(offset - start)
    return start + before.rfind(b"\n") + 1 if b"\n" in before or start == 0 else offset
