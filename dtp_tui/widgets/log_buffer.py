"""Lines of many ranks in bounded memory, made harmless and filtered; pure."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from dtp_trainer import wire
from dtp_tui.cleaning import harmless

CAPACITY = 20_000
BYTES_CAP = 16 * 1024 * 1024


class Level(IntEnum):
    DEBUG = 0
    INFO = 1
    WARNING = 2
    ERROR = 3


_LEVEL = re.compile(
    r"(?P<ERROR>\b(?:ERROR|CRITICAL|FATAL)\b|^Traceback \(|^\w*(?:Error|Exception)\b)"
    r"|(?P<WARNING>\bWARN(?:ING)?\b|Warning:)"
    r"|(?P<DEBUG>\b(?:DEBUG|TRACE)\b)"
)
"""The first word in a line that names a level."""
_WORDS = (
    "ERROR",
    "CRIT",
    "FATAL",
    "Trace",
    "Error",
    "Exception",
    "WARN",
    "Warning",
    "DEBUG",
    "TRACE",
)
"""None of them in a line: no level in it. Nearly every line is told so, ten times faster."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    at: float
    source: str
    """``rank3`` or ``worker0``."""
    text: str
    """Printable, without control characters, at most `LINE_CAP` characters and a note."""
    level: Level


@dataclass(frozen=True, slots=True)
class LogFilter:
    """What of a log is shown. `pattern` is a regular expression, ``!`` before it turns it round."""

    pattern: str = ""
    source: str | None = None
    errors_only: bool = False

    def compile(self) -> Callable[[LogEntry], bool]:
        wanted = matcher(self.pattern)
        least = Level.WARNING if self.errors_only else Level.DEBUG

        def keeps(entry: LogEntry) -> bool:
            return (
                entry.level >= least
                and (self.source is None or entry.source == self.source)
                and wanted(entry.text)
            )

        return keeps


def matcher(pattern: str) -> Callable[[str], bool]:
    """Case-insensitive search; what is no regular expression is looked for as it stands."""
    turned, wanted = pattern.startswith("!"), pattern.removeprefix("!")
    if not wanted:
        return lambda _text: True
    try:
        search = re.compile(wanted, re.IGNORECASE).search
    except re.error:
        search = re.compile(re.escape(wanted), re.IGNORECASE).search
    return lambda text: (search(text) is None) is turned


def entry(line: wire.Text) -> LogEntry:
    text = harmless(line.text)
    head = text[:400]
    named = _LEVEL.search(head) if any(word in head for word in _WORDS) else None
    level = Level[named.lastgroup] if named and named.lastgroup else Level.INFO
    return LogEntry(line.at, line.source, text, level)


class LogBuffer:
    """The newest lines, and which of them the filter lets through.

    Lines are known by their number, which never changes: `first` is the oldest kept. Trimming is
    amortised: up to an eighth more than the capacity is held for a while.
    """

    def __init__(self, *, capacity: int = CAPACITY, bytes_cap: int = BYTES_CAP) -> None:
        self.capacity = capacity
        self.first = 0
        self.filter = LogFilter()
        self._bytes_cap = bytes_cap
        self._bytes = 0
        self._entries: list[LogEntry] = []
        self._shown: list[int] = []
        self._keeps = self.filter.compile()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def total(self) -> int:
        """Lines that ever came."""
        return self.first + len(self._entries)

    @property
    def shown(self) -> int:
        """How many lines the filter lets through."""
        return len(self._shown)

    def number(self, row: int) -> int:
        """Of the line in a row of what is shown."""
        return self._shown[row]

    def line(self, row: int) -> LogEntry:
        return self._entries[self._shown[row] - self.first]

    def sources(self) -> tuple[str, ...]:
        """Of the lines kept: workers first, then ranks by number."""
        return tuple(sorted({e.source for e in self._entries}, key=_by_number))

    def extend(self, entries: Iterable[LogEntry]) -> int:
        """Append; returns how many shown rows were dropped from the top."""
        for new in entries:
            if self._keeps(new):
                self._shown.append(self.total)
            self._entries.append(new)
            self._bytes += len(new.text)
        return self._trim()

    def set_filter(self, wanted: LogFilter) -> None:
        self.filter = wanted
        self._keeps = wanted.compile()
        keeps, first = self._keeps, self.first
        self._shown = [first + i for i, entry_ in enumerate(self._entries) if keeps(entry_)]

    def row_of(self, number: int) -> int:
        """The row that shows this line, or the first one after it."""
        return bisect_left(self._shown, number)

    def _trim(self) -> int:
        excess = 0
        if len(self._entries) > self.capacity * 9 // 8:
            excess = len(self._entries) - self.capacity
        kept = self._bytes - sum(len(e.text) for e in self._entries[:excess])
        while kept > self._bytes_cap and excess < len(self._entries) - 1:
            kept -= len(self._entries[excess].text)
            excess += 1
        if not excess:
            return 0
        del self._entries[:excess]
        self._bytes = kept
        self.first += excess
        gone = bisect_left(self._shown, self.first)
        del self._shown[:gone]
        return gone


def _by_number(source: str) -> tuple[bool, int, str]:
    digits = source.lstrip("abcdefghijklmnopqrstuvwxyz")
    return source.startswith("rank"), int(digits) if digits.isdecimal() else 0, source
