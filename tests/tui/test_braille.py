"""Dots, scales and ticks."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from dtp_engine.series import Bucket
from dtp_tui.widgets.braille import Canvas, draw, nice_scale, step_ticks, time_ticks, trace


def flat(index: int, value: float) -> Bucket:
    return Bucket(index, value, value, value)


def drawn(canvas: Canvas) -> list[str]:
    return [
        "".join(canvas.cell(column, row)[0] for column in range(canvas.width))
        for row in range(canvas.height)
    ]


def test_dots_stand_where_the_values_are() -> None:
    """The lowest value is the lowest dot, the highest the highest."""
    for value, dot in ((0.0, "⡀"), (1.0, "⠄"), (2.0, "⠂"), (3.0, "⠁")):
        canvas = Canvas(1, 1)
        draw(canvas, [flat(0, value)], 0.0, 3.0, owner=1)
        assert drawn(canvas) == [dot]
    assert canvas.cell(0, 0)[1] == 1


def test_neighbours_touch() -> None:
    """A jump is drawn as a vertical line, so that no curve falls apart."""
    spans = trace([flat(0, 1.0), flat(1, 9.0)], 2)
    assert spans == [(1.0, 1.0), (1.0, 9.0)]


def test_small_holes_are_bridged_and_large_ones_stay() -> None:
    """A sample that came late leaves no gap; a pause does."""
    early = [flat(i, 1.0) for i in range(0, 20, 2)]
    late = [flat(i, 1.0) for i in range(60, 80, 2)]
    spans = trace([*early, *late], 80)
    assert all(span is not None for span in spans[:19])
    assert spans[30:58] == [None] * 28


def test_the_first_curve_lies_on_top() -> None:
    """A cell that two curves share has the colour of the one drawn last."""
    canvas = Canvas(1, 1)
    draw(canvas, [flat(0, 1.0)], 0.0, 3.0, owner=2)
    draw(canvas, [flat(0, 2.0)], 0.0, 3.0, owner=1)
    assert canvas.cell(0, 0)[1] == 1


def test_values_that_are_no_numbers_leave_a_hole() -> None:
    """NaN and infinity cannot be drawn and break nothing."""
    spans = trace([flat(0, 1.0), flat(1, math.nan), flat(2, math.inf), flat(3, 1.0)], 4)
    assert spans[0] == (1.0, 1.0)
    assert spans[3] == (1.0, 1.0)


@given(
    st.floats(-1e9, 1e9, allow_nan=False),
    st.floats(-1e9, 1e9, allow_nan=False),
    st.integers(2, 8),
)
def test_a_scale_holds_what_it_is_for(one: float, other: float, most: int) -> None:
    """Limits enclose the values, ticks are few, evenly spaced and in order."""
    low, high = min(one, other), max(one, other)
    scale = nice_scale(low, high, most)
    slack = (scale.high - scale.low) * 1e-6
    assert scale.low <= low + slack
    assert scale.high >= high - slack
    assert 2 <= len(scale.ticks) <= most + 1
    assert list(scale.ticks) == sorted(scale.ticks)


def test_scales_are_round() -> None:
    """People read 0, 0.5, 1, not 0.13, 0.41."""
    assert nice_scale(0.13, 2.31, 6).ticks == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    assert nice_scale(0.0, 8312.0, 3).ticks == (0.0, 5000.0, 10000.0)


def test_a_constant_has_room_above_and_below() -> None:
    """A flat line is drawn inside the chart."""
    scale = nice_scale(8.0, 8.0, 4)
    assert scale.low < 8.0 < scale.high


def test_time_ticks_are_at_round_moments() -> None:
    """Labels do not overlap, and stand in the chart."""
    ticks = time_ticks(1_800_000_003.0, 1_800_000_303.0, 80)
    assert 2 <= len(ticks) <= 8
    assert all(0 <= column < 80 for column, _ in ticks)
    assert all(label.endswith(("00", "30")) or ":" in label for _, label in ticks)


def test_step_ticks_are_whole_steps() -> None:
    """1,000, never 1,000.5; nothing in an empty range."""
    assert [label for _, label in step_ticks(0, 5000, 60)][:2] == ["0", "2,000"]
    assert step_ticks(5, 5, 60) == []
