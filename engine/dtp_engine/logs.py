"""Lines of many workers as one feed in the order of time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from enum import Enum
from typing import TypeAlias

from dtp_engine.backend import LogLine

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


class Reorder:
    """Lines that arrive almost in the order of time, from several feeds; each is held for a moment
    so that a late one still finds its place.

    Moments are of one monotonic clock, s, and never go back. The order within a feed is kept.
    """

    def __init__(self, *, hold_s: float = 0.2) -> None:
        self._hold_s = hold_s
        self._held: list[tuple[_Place, LogLine]] = []
        self._due: deque[tuple[float, _Place]] = deque()
        self._newest: dict[int, float] = {}
        self._order = itertools.count()

    def add(self, feed: int, line: LogLine, *, moment: float) -> None:
        self._newest[feed] = max(self._newest.get(feed, 0.0), time_of(line))
        place = (self._newest[feed], feed, next(self._order))
        heapq.heappush(self._held, (place, line))
        self._due.append((moment + self._hold_s, place))

    def ready(self, moment: float) -> list[LogLine]:
        """Lines that were held long enough, and those that are older than them."""
        newest: _Place = (float("-inf"), 0, 0)
        while self._due and self._due[0][0] <= moment:
            newest = max(newest, self._due.popleft()[1])
        return self._take(newest)

    def rest(self) -> list[LogLine]:
        self._due.clear()
        return self._take((float("inf"), 0, 0))

    def next_moment(self) -> float | None:
        """When to call `ready` again; None when nothing is held."""
        return self._due[0][0] if self._due else None

    def _take(self, newest: _Place) -> list[LogLine]:
        taken = []
        while self._held and self._held[0][0] <= newest:
            taken.append(heapq.heappop(self._held)[1])
        return taken


async def merge_live(
    feeds: Sequence[AsyncIterator[LogLine]], *, hold_s: float = 0.2
) -> AsyncIterator[LogLine]:
    """`merge` for feeds that are still being written; ends when all of them have ended.

    A line comes out at most about `hold_s` after it came in. What a feed raises is raised here.
    """
    arrivals: asyncio.Queue[_Arrival] = asyncio.Queue(maxsize=_AHEAD)
    pumps = [asyncio.create_task(_pump(n, feed, arrivals)) for n, feed in enumerate(feeds)]
    held = Reorder(hold_s=hold_s)
    try:
        running = len(pumps)
        while running:
            arrival = await _next(arrivals, held.next_moment())
            if isinstance(arrival, tuple):
                held.add(*arrival, moment=time.monotonic())
            elif isinstance(arrival, Exception):
                raise arrival
            elif arrival is _End.ENDED:
                running -= 1
            for line in held.ready(time.monotonic()):
                yield line
        for line in held.rest():
            yield line
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


class _End(Enum):
    ENDED = "ended"
    LATE = "late"


_Arrival: TypeAlias = tuple[int, LogLine] | Exception | _End
_AHEAD = 1000
"""Lines read before the consumer takes them."""


async def _pump(
    number: int, feed: AsyncIterator[LogLine], arrivals: asyncio.Queue[_Arrival]
) -> None:
    try:
        async for line in feed:
            await arrivals.put((number, line))
    except Exception as error:  # noqa: BLE001 - raised again by the consumer
        await arrivals.put(error)
    else:
        await arrivals.put(_End.ENDED)


async def _next(arrivals: asyncio.Queue[_Arrival], until: float | None) -> _Arrival:
    if until is None:
        return await arrivals.get()
    try:
        async with asyncio.timeout(until - time.monotonic()):
            return await arrivals.get()
    except TimeoutError:
        return _End.LATE
