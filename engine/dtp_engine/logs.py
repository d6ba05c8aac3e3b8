"""Lines of many workers as one feed in the order of time."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
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
