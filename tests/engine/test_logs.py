"""Lines of many workers become one feed in the order of time; no line is lost or doubled."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dtp_engine.backend import LogLine
from dtp_engine.logs import merge, time_of
from dtp_trainer import wire


def line(at: float, worker: int = 0, cursor: str = "") -> LogLine:
    return LogLine(worker, cursor, wire.Text(at, f"rank{worker}", "out", "x"), None)


def feed(worker: int, *times: float) -> list[LogLine]:
    return [line(at, worker, str(number)) for number, at in enumerate(times)]


def times(lines: Sequence[LogLine]) -> list[float]:
    return [time_of(found) for found in lines]


def test_feeds_are_merged_by_time() -> None:
    """Lines of several workers come in the order of time."""
    assert times(list(merge([feed(0, 1, 4, 5), feed(1, 2, 3), []]))) == [1, 2, 3, 4, 5]


def test_record_has_its_place_too() -> None:
    """A record is ordered by its own time."""
    record = LogLine(1, "", None, wire.Exit(2.0, 1, 0, ""))
    assert times(list(merge([feed(0, 1, 3), [record]]))) == [1, 2, 3]


def test_clock_that_went_back_does_not_reorder_a_worker() -> None:
    """Within a worker the order is the one in which it wrote, whatever its clock did."""
    found = list(merge([feed(0, 10, 5, 11), feed(1, 7, 10.5)]))
    assert times(found) == [7, 10, 5, 10.5, 11]


@given(st.lists(st.lists(st.floats(0, 100), max_size=20), max_size=5))
def test_merge_keeps_each_feed_and_loses_nothing(clocks: list[list[float]]) -> None:
    """For any clocks, each worker's lines come all, once, in their order."""
    feeds = [feed(worker, *clock) for worker, clock in enumerate(clocks)]
    found = list(merge(feeds))
    assert [[x for x in found if x.worker == n] for n in range(len(feeds))] == feeds
