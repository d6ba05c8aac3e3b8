"""Lines of many workers as one feed in the order of time, and what is new of it."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import TypeAlias

from dtp_engine.backend import Backend, Cursor, LogLine, Since
from dtp_engine.jobs import Attempt

_CONTEXT_BYTES, _RECENT_ATTEMPTS = 1 << 20, 4
_Place: TypeAlias = tuple[float, int, int]
"""Time, then feed, then order within the feed."""


def time_of(line: LogLine) -> float:
    """Unix time, s."""
    if line.text is not None:
        return line.text.at
    return line.record.at if line.record is not None else 0.0


def merge(feeds: Iterable[Iterable[LogLine]]) -> Iterator[LogLine]:
    """Lines of feeds that each are in order, in the order of time.

    Reads one line of each feed ahead. The order within a feed is kept whatever its times say: a
    line that seems older than the one before it takes that one's place in time.
    """
    placed = (_placed(feed, number) for number, feed in enumerate(feeds))
    return (line for _, line in heapq.merge(*placed, key=lambda pair: pair[0]))


def _placed(feed: Iterable[LogLine], number: int) -> Iterator[tuple[_Place, LogLine]]:
    newest = 0.0
    for order, line in enumerate(feed):
        newest = max(newest, time_of(line))
        yield (newest, number, order), line


class Tail:
    """What the attempts of a job said, each line once, whenever `new_lines` is asked.

    attempt: only this one's. since: Unix time from about which on, and what the last attempts said
    just before.
    """

    def __init__(
        self, backend: Backend, *, attempt: int | None = None, since: float | None = None
    ) -> None:
        self._backend, self._attempt, self._since = backend, attempt, since
        self._cursors: dict[int, dict[int, str]] = {}

    async def new_lines(self, attempts: Sequence[Attempt]) -> AsyncIterator[tuple[int, LogLine]]:
        """(attempt, line) of the whole list of attempts, oldest first."""
        for one in attempts:
            if self._attempt in (None, one.number):
                after = self._cursors.setdefault(one.number, {})
                recent = one in attempts[-_RECENT_ATTEMPTS:]
                start: Cursor = dict(after)
                async for line in self._backend.logs(
                    one.id, after=start, since=self._start(recent=recent)
                ):
                    after[line.worker] = line.cursor
                    yield one.number, line

    def _start(self, *, recent: bool) -> Since | None:
        if self._since is None:
            return None
        return Since(self._since, _CONTEXT_BYTES if recent else 0)
