"""Samples of many workers → series over time; pure.

`MetricHistory` is fed the records of a job in any order and answers with `Series` (compact arrays)
and `Mark`s. A series never forgets: when it is full its older half is thinned to the extremes, so
that the shape of a week is kept and the last hours are exact. A chart asks `Series.view` for as
many buckets as it has columns; each bucket knows its lowest and highest value, so no spike is lost.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

from dtp_trainer import wire

CAPACITY = 16_384
"""Points of one series before its older half is thinned: 4.5 hours at one sample a second."""
FRESH_S = 10.0
"""A worker whose newest sample is older than this, beside the newest of all, no longer counts."""

_OF_GPUS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "gpu_percent": fmean,
    "gpu_memory_bytes": math.fsum,
    "gpu_watts": math.fsum,
    "gpu_celsius": max,
    "gpu_sm_mhz": fmean,
    "gpu_pcie_rx_bytes_per_s": math.fsum,
    "gpu_pcie_tx_bytes_per_s": math.fsum,
}
RESOURCES = ("cpu_percent", "memory_bytes", *_OF_GPUS)
"""Names kept for each worker from `wire.Host`; several GPUs are one number: the mean percentage
and clock, the sum of bytes and watts, the highest temperature."""


class Axis(StrEnum):
    TIME = "time"
    STEP = "step"
    """Steps that were trained again after a restart count once, with their newest value."""


class MarkKind(StrEnum):
    ATTEMPT = "attempt"
    GENERATION = "generation"
    CHECKPOINT = "checkpoint"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Point:
    at: float
    """Unix time."""
    step: int
    value: float
    """May be NaN or infinite, as the script reported it."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a series did within one column of a chart; non-finite only when nothing finite was
    there."""

    index: int
    """Column, from 0."""
    low: float
    high: float
    last: float


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A moment worth a vertical line."""

    at: float
    step: int | None
    kind: MarkKind
    text: str


class Series:
    """One measured quantity over time, of the whole job (`worker` None) or of one worker."""

    def __init__(self, name: str, worker: int | None = None, *, capacity: int = CAPACITY) -> None:
        self.name = name
        self.worker = worker
        self._capacity = max(8, capacity)
        self._at = array("d")
        self._step = array("q")
        self._value = array("d")
        self._all_finite = True

    def __len__(self) -> int:
        return len(self._at)

    def add(self, at: float, step: int, value: float) -> None:
        """Points that come late are put where their time belongs."""
        self._all_finite = self._all_finite and math.isfinite(value)
        where = len(self._at)
        if where and at < self._at[-1]:
            where = bisect_right(self._at, at)
        self._at.insert(where, at)
        self._step.insert(where, step)
        self._value.insert(where, value)
        if len(self._at) > self._capacity:
            self._thin()

    @property
    def last(self) -> Point | None:
        return self._point(len(self) - 1) if len(self) else None

    def points(self, *, since: float = -math.inf) -> Iterator[Point]:
        """Points after `since`, oldest first."""
        return map(self._point, range(bisect_right(self._at, since), len(self)))

    def span(self, axis: Axis = Axis.TIME) -> tuple[float, float] | None:
        """First and last position on the axis; None while empty."""
        if not len(self):
            return None
        if axis is Axis.TIME:
            return self._at[0], self._at[-1]
        return float(min(self._step)), float(max(self._step))

    def view(
        self,
        points: int,
        *,
        start: float | None = None,
        end: float | None = None,
        axis: Axis = Axis.TIME,
    ) -> tuple[Bucket, ...]:
        """At most `points` buckets of equal width over [start, end] (the whole span unless given);
        buckets without a point are absent."""
        span = self.span(axis)
        if span is None or points < 1:
            return ()
        low, high = span[0] if start is None else start, span[1] if end is None else end
        positions, values = self._along(axis)
        return tuple(_buckets(positions, values, points, low, high, finite=self._all_finite))

    def _along(self, axis: Axis) -> tuple[Sequence[float], Sequence[float]]:
        if axis is Axis.TIME:
            return self._at, self._value
        kept = list(_newest_of_each_step(self._step))
        return [float(self._step[i]) for i in kept], [self._value[i] for i in kept]

    def _point(self, index: int) -> Point:
        return Point(self._at[index], self._step[index], self._value[index])

    def _thin(self) -> None:
        """Of each four of the older half keep the lowest and the highest."""
        half = len(self) // 2 // 4 * 4
        kept = [i for first in range(0, half, 4) for i in self._extremes(first)]
        kept.extend(range(half, len(self)))
        self._at = array("d", (self._at[i] for i in kept))
        self._step = array("q", (self._step[i] for i in kept))
        self._value = array("d", (self._value[i] for i in kept))

    def _extremes(self, first: int) -> list[int]:
        four = sorted(range(first, first + 4), key=lambda i: _sortable(self._value[i]))
        return sorted((four[0], four[-1]))


class MetricHistory:
    """All that a job's workers have measured; `add` the records of its log lines in any order.

    Of the job (worker None): every reported value (loss, lr, accuracy …), ``samples_per_s``,
    ``tokens_per_s``, each phase of a step as ``<phase>_s`` (``step_s`` is the whole), ``data_wait``
    (share of the step, 0..1). Of each worker: its phases and `RESOURCES`.
    """

    def __init__(self, *, capacity: int = CAPACITY) -> None:
        self.revision = 0
        """Grows with every record that changed something."""
        self.total_steps: int | None = None
        self.attempt = 0
        """The newest one seen."""
        self._capacity = capacity
        self._series: dict[tuple[str, int | None], Series] = {}
        self._marks: list[Mark] = []
        self._events: set[int] = set()
        self._attempts: set[int] = set()

    def add(self, attempt: int, record: wire.Record) -> None:
        """Events are known by their number, so that the same one from two sources counts once."""
        match record:
            case wire.Window():
                self._enter(attempt, record.at)
                self._add_window(record)
            case wire.Host():
                self._enter(attempt, record.at)
                self._add_host(record)
            case wire.GangEvent():
                if not self._add_event(record):
                    return
            case wire.Exit():
                return
        self.revision += 1

    def names(self, *, worker: int | None = None) -> tuple[str, ...]:
        """Of the job, or of one worker; in the order in which they first came."""
        return tuple(name for name, of in self._series if of == worker)

    def workers(self, name: str) -> tuple[int, ...]:
        return tuple(sorted(w for n, w in self._series if n == name and w is not None))

    def series(self, name: str, worker: int | None = None) -> Series:
        """Empty when nothing of that name came."""
        return self._series.get((name, worker)) or Series(name, worker, capacity=8)

    def last(self, name: str, worker: int | None = None) -> float | None:
        point = self.series(name, worker).last
        return None if point is None else point.value

    def total(self, name: str, *, mean: bool = False) -> float | None:
        """Sum (or mean) of the newest values of the workers that still report."""
        newest = [self.series(name, worker).last for worker in self.workers(name)]
        points = [point for point in newest if point is not None]
        if not points:
            return None
        since = max(point.at for point in points) - FRESH_S
        values = [point.value for point in points if point.at >= since]
        return fmean(values) if mean else math.fsum(values)

    def total_view(
        self, name: str, points: int, *, start: float, end: float, mean: bool = False
    ) -> tuple[Bucket, ...]:
        """The workers' series of that name folded to one, on the time axis."""
        views = [
            self.series(name, worker).view(points, start=start, end=end)
            for worker in self.workers(name)
        ]
        return fold(views, fmean if mean else math.fsum)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Oldest first."""
        return tuple(self._marks)

    @property
    def newest_at(self) -> float | None:
        """Time of the newest sample of any series."""
        ends = [series.last for series in self._series.values()]
        return max((point.at for point in ends if point is not None), default=None)

    def _enter(self, attempt: int, at: float) -> None:
        if attempt in self._attempts:
            return
        self._attempts.add(attempt)
        self.attempt = max(self.attempt, attempt)
        insort(self._marks, Mark(at, None, MarkKind.ATTEMPT, f"attempt {attempt}"))

    def _add_window(self, window: wire.Window) -> None:
        phases = {f"{name}_s": spread["median"] for name, spread in window.phases.items()}
        self._put_all(phases, window.at, window.step, window.worker)
        if window.rank != 0:
            return
        self.total_steps = window.total_steps or self.total_steps
        rates = {"samples_per_s": window.samples_per_s, "tokens_per_s": window.tokens_per_s}
        share = {"data_wait": _share(phases)}
        for values in (window.values, rates, phases, share):
            self._put_all(values, window.at, window.step, None)

    def _add_host(self, host: wire.Host) -> None:
        values = {"cpu_percent": host.cpu_percent, "memory_bytes": float(host.memory_bytes)}
        for name, folded in _OF_GPUS.items():
            known = [value for value in getattr(host, name) if value is not None]
            if known:
                values[name] = folded(known)
        self._put_all(values, host.at, 0, host.worker)

    def _add_event(self, event: wire.GangEvent) -> bool:
        kind = mark_kind(event.name)
        if kind is None or event.seq in self._events:
            return False
        self._events.add(event.seq)
        insort(self._marks, Mark(event.at, event.step, kind, event.text))
        return True

    def _put_all(
        self, values: Mapping[str, float | None], at: float, step: int, worker: int | None
    ) -> None:
        for name, value in values.items():
            if value is None:
                continue
            key = (name, worker)
            if key not in self._series:
                self._series[key] = Series(name, worker, capacity=self._capacity)
            self._series[key].add(at, step, value)


def mark_kind(event_name: str) -> MarkKind | None:
    """Which events of the gang deserve a line in a chart."""
    match event_name:
        case "generation_started":
            return MarkKind.GENERATION
        case "checkpoint":
            return MarkKind.CHECKPOINT
        case "rank_failed" | "worker_lost" | "hang":
            return MarkKind.FAILURE
        case _:
            return None


def fold(
    views: Iterable[Sequence[Bucket]], how: Callable[[Sequence[float]], float]
) -> tuple[Bucket, ...]:
    """Buckets of several series, column by column.

    A series that misses a few columns counts there with its last value, so that workers which
    sample at different moments do not make the sum flicker.
    """
    drawn = [view for view in views if view]
    end = max((view[-1].index for view in drawn), default=0)
    columns: dict[int, list[Bucket]] = {}
    for view in drawn:
        for bucket in _without_small_gaps(view, end):
            columns.setdefault(bucket.index, []).append(bucket)
    return tuple(
        Bucket(
            index, how([b.low for b in of]), how([b.high for b in of]), how([b.last for b in of])
        )
        for index, of in sorted(columns.items())
    )


def sparkline(values: Sequence[float], width: int = 8) -> str:
    """The newest `width` values as text. Noise is not blown up: the whole height is at least a
    quarter of the highest value.

    >>> sparkline([1, 2, 3, 4]), sparkline([100, 101, 100])
    ('▁▃▆█', '▄▅▄')
    """
    finite = [value for value in values[-width:] if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    height = max(high - low, abs(high) * 0.25) or 1.0
    middle = (low + high) / 2
    return "".join("▁▂▃▄▅▆▇█"[round(3.5 + (value - middle) / height * 7)] for value in finite)


def _buckets(
    positions: Sequence[float],
    values: Sequence[float],
    points: int,
    low: float,
    high: float,
    *,
    finite: bool,
) -> Iterator[Bucket]:
    width = (high - low) / points or 1.0
    first, stop = bisect_left(positions, low), bisect_right(positions, high)
    while first < stop:
        index = min(points - 1, int((positions[first] - low) / width))
        edge = high if index == points - 1 else low + (index + 1) * width
        after = bisect_right(positions, edge) if edge == high else bisect_left(positions, edge)
        after = min(stop, max(after, first + 1))
        found = values[first:after]
        chosen = found if finite else [v for v in found if math.isfinite(v)] or found
        yield Bucket(index, min(chosen), max(chosen), found[-1])
        first = after


def _without_small_gaps(view: Sequence[Bucket], end: int, most: int = 3) -> Iterator[Bucket]:
    following = [bucket.index for bucket in view[1:]] + [end + 1]
    for bucket, next_index in zip(view, following, strict=True):
        yield bucket
        is_newest = next_index == end + 1
        if next_index - bucket.index <= most + 1 or is_newest:
            stop = min(next_index, bucket.index + 1 + most)
            for index in range(bucket.index + 1, stop):
                yield Bucket(index, bucket.last, bucket.last, bucket.last)


def _newest_of_each_step(steps: Sequence[int]) -> list[int]:
    kept: list[int] = []
    earliest = math.inf
    for index in range(len(steps) - 1, -1, -1):
        if steps[index] < earliest:
            earliest = steps[index]
            kept.append(index)
    kept.reverse()
    return kept


def _share(phases: Mapping[str, float]) -> float | None:
    step, data = phases.get("step_s"), phases.get("data_s")
    return None if not step or data is None else min(1.0, data / step)


def _sortable(value: float) -> float:
    return math.inf if math.isnan(value) else value
