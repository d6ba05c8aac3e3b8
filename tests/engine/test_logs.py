"""Lines of many workers become one feed in the order of time; no line is lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtp_engine.backend import LogLine
from dtp_engine.logs import Reorder, merge, merge_live, time_of
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


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100), st.floats(0, 1)), max_size=40),
    st.floats(0, 2),
)
def test_reorder_keeps_each_feed_and_loses_nothing(
    arrivals: list[tuple[int, float, float]], hold_s: float
) -> None:
    """However lines arrive, each feed's come all, once, in their order."""
    held = Reorder(hold_s=hold_s)
    moment, found = 0.0, []
    for worker, at, passed in arrivals:
        moment += passed
        held.add(worker, line(at, worker), moment=moment)
        found += held.ready(moment)
    found += held.rest()
    for worker in range(4):
        assert [time_of(x) for x in found if x.worker == worker] == [
            at for number, at, _ in arrivals if number == worker
        ]


def test_late_line_finds_its_place_while_others_are_held() -> None:
    """A line that arrives within the hold comes before younger ones."""
    held = Reorder(hold_s=1.0)
    held.add(0, line(5), moment=0.0)
    held.add(1, line(4, 1), moment=0.5)
    assert held.ready(0.9) == []
    assert held.next_moment() == 1.0
    assert times(held.ready(1.0)) == [4, 5]
    assert held.ready(2.0) == []


async def slowly(lines: Sequence[LogLine]) -> AsyncIterator[LogLine]:
    for found in lines:
        await asyncio.sleep(0)
        yield found


async def test_live_feeds_are_merged() -> None:
    """Feeds that are still being written end as one feed in the order of time."""
    feeds = [slowly(feed(0, 1, 4, 5)), slowly(feed(1, 2, 3)), slowly([])]
    assert times([found async for found in merge_live(feeds)]) == [1, 2, 3, 4, 5]


async def test_live_line_comes_out_while_its_feed_waits() -> None:
    """A line is not kept back by feeds that are silent."""
    silent: asyncio.Event = asyncio.Event()

    async def waiting() -> AsyncIterator[LogLine]:
        yield line(1)
        await silent.wait()

    merged = merge_live([waiting()], hold_s=0.01)
    assert time_of(await asyncio.wait_for(anext(merged), 10)) == 1
    await merged.aclose()  # type: ignore[attr-defined]


async def test_error_of_a_live_feed_reaches_the_reader() -> None:
    """What one feed raises ends the whole."""

    async def failing() -> AsyncIterator[LogLine]:
        yield line(1)
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        _ = [found async for found in merge_live([failing(), slowly(feed(1, 2))])]
