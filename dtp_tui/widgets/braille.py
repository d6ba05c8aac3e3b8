"""Lines drawn in dots, eight to a cell, and the numbers along their axes; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median

from dtp_engine.series import Bucket

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
_GAP = 4
"""A hole wider than so many usual distances between samples stays a hole."""

Range = tuple[float, float]
"""Lowest and highest value in one column of dots."""


class Canvas:
    """A field of `width` by `height` cells = 2·width by 4·height dots; row 0 is the top."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._dots = [bytearray(width) for _ in range(height)]
        self._owner = [bytearray(width) for _ in range(height)]

    def bar(self, x: int, top: int, bottom: int, owner: int) -> None:
        """A column of dots from `top` to `bottom`, both inclusive; `owner` (1..255) colours the
        cells."""
        for y in range(max(0, top), min(4 * self.height - 1, bottom) + 1):
            self._dots[y >> 2][x >> 1] |= _DOTS[y & 3][x & 1]
            self._owner[y >> 2][x >> 1] = owner

    def cell(self, column: int, row: int) -> tuple[str, int]:
        """The character and its owner; owner 0 = empty."""
        return chr(0x2800 + self._dots[row][column]), self._owner[row][column]


def draw(canvas: Canvas, buckets: Sequence[Bucket], low: float, high: float, *, owner: int) -> None:
    """Draw a series whose buckets are columns of dots, between the y limits."""
    dots = 4 * canvas.height - 1
    scale = dots / ((high - low) or 1.0)
    for x, span in enumerate(trace(buckets, 2 * canvas.width)):
        if span is not None:
            top, bottom = (dots - round((value - low) * scale) for value in (span[1], span[0]))
            canvas.bar(x, top, bottom, owner)


def trace(buckets: Sequence[Bucket], columns: int) -> list[Range | None]:
    """What each column of dots covers: neighbours touch, small holes are bridged by a straight
    line."""
    drawn = [b for b in buckets if math.isfinite(b.low) and b.index < columns]
    spans: list[Range | None] = [None] * columns
    gaps = [after.index - before.index for before, after in pairwise(drawn)]
    widest = _GAP * median(gaps) if gaps else 0
    for bucket in drawn:
        spans[bucket.index] = (bucket.low, bucket.high)
    for before, after in pairwise(drawn):
        if after.index - before.index <= widest:
            _connect(spans, before, after)
    return spans


def _connect(spans: list[Range | None], before: Bucket, after: Bucket) -> None:
    start = before.last if math.isfinite(before.last) else before.high
    reach = min(max(start, after.low), after.high)
    distance = after.index - before.index
    previous = start
    for offset in range(1, distance):
        value = start + (reach - start) * offset / distance
        spans[before.index + offset] = (min(previous, value), max(previous, value))
        previous = value
    spans[after.index] = (min(after.low, previous), max(after.high, previous))


@dataclass(frozen=True, slots=True)
class Scale:
    """Limits of a y axis and the values that get a label, lowest first."""

    low: float
    high: float
    ticks: tuple[float, ...]


def nice_scale(low: float, high: float, most: int) -> Scale:
    """Round limits around [low, high] with at most `most` ticks at 1, 2, 2.5 or 5 times 10ⁿ."""
    if high - low <= max(abs(high), abs(low)) * 1e-9:
        middle = high
        low, high = middle - (abs(middle) * 0.5 or 1.0), middle + (abs(middle) * 0.5 or 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / max(1, most)))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50, 100):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < max(2, most):
            break
    ticks = tuple(step * n for n in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def time_ticks(start: float, end: float, columns: int) -> list[tuple[int, str]]:
    """(column, ``14:03`` or ``14:03:20``) at round moments of local time."""
    span = end - start
    if span <= 0 or columns < 8:
        return []
    step = next((s for s in _TIME_STEPS if span / s * 12 <= columns), _TIME_STEPS[-1])
    shift = datetime.fromtimestamp(start).astimezone().utcoffset()
    offset = shift.total_seconds() if shift else 0.0
    moment = math.ceil((start + offset) / step) * step - offset
    form = "%d %b" if step >= 86_400 else "%H:%M" if step >= 60 else "%H:%M:%S"
    ticks = []
    while moment <= end:
        label = datetime.fromtimestamp(moment).astimezone().strftime(form)
        ticks.append((int((moment - start) / span * (columns - 1)), label))
        moment += step
    return ticks


def step_ticks(start: float, end: float, columns: int) -> list[tuple[int, str]]:
    """(column, ``1,200``) at round steps."""
    if end <= start or columns < 8:
        return []
    scale = nice_scale(start, end, max(2, columns // 14))
    return [
        (int((tick - start) / (end - start) * (columns - 1)), f"{tick:,.0f}")
        for tick in scale.ticks
        if start <= tick <= end and tick == int(tick)
    ]
