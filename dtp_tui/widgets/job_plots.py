"""What the four charts of a job show; pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from dtp_engine.series import Axis, Mark, MetricHistory, Series
from dtp_tui import labels
from dtp_tui.messages import JobPicture
from dtp_tui.widgets.chart import Curve, Plot
from dtp_tui.widgets.jobs_table import memory

WINDOWS_S = (60.0, 300.0, 900.0, 3600.0, 6 * 3600.0)
"""Choices of how much of the past the charts show; beyond them, all of it."""
_WITHOUT_STEPS = "no steps reported"


@dataclass(frozen=True, slots=True)
class Past:
    """What the charts show of the past."""

    window_s: float | None = None
    """None: all."""
    axis: Axis = Axis.TIME

    def wider(self) -> Past:
        later = [w for w in WINDOWS_S if self.window_s is not None and w > self.window_s]
        return Past(later[0] if later else None, self.axis)

    def closer(self) -> Past:
        earlier = [w for w in WINDOWS_S if self.window_s is None or w < self.window_s]
        return Past(earlier[-1] if earlier else WINDOWS_S[0], self.axis)

    def turned(self) -> Past:
        return Past(self.window_s, Axis.STEP if self.axis is Axis.TIME else Axis.TIME)

    def __str__(self) -> str:
        past = "all" if self.window_s is None else f"last {labels.duration(self.window_s)}"
        return f"{past} by {self.axis}"


@dataclass(frozen=True, slots=True)
class _Ground:
    """What the plots of one picture share."""

    start: float
    end: float
    axis: Axis
    marks: tuple[Mark, ...]


def plots(picture: JobPicture, shown: Past) -> dict[str, Plot]:
    """Id of each chart → what it shows."""
    history = picture.history
    start, end = time_range(history, shown, picture.now, alive=picture.view.job.active)
    ground = _Ground(start, end, shown.axis, history.marks)
    return {
        "loss": _loss(history, ground),
        "throughput": _throughput(history, ground),
        "resources": _resources(picture, ground),
        "step-time": _step_time(history, ground),
    }


def time_range(
    history: MetricHistory, shown: Past, now: datetime, *, alive: bool
) -> tuple[float, float]:
    """Where the time axis begins and ends. It moves in jumps of some columns, so that a chart is
    not redrawn in all its dots at every sample."""
    newest = history.newest_at
    oldest = min((mark.at for mark in history.marks), default=newest)
    if newest is None or oldest is None:
        return now.timestamp() - 60, now.timestamp()
    if shown.window_s is None:
        return oldest, oldest + _rounded_up(newest - oldest)
    jump = shown.window_s / 30
    end = (now.timestamp() if alive else newest) // jump * jump + jump
    return end - shown.window_s, end


def step_range(series: Series, start: float, end: float) -> tuple[float, float]:
    """The steps that were trained between two moments, rounded outwards."""
    steps = [point.step for point in series.points(since=start - 1e-9) if point.at <= end]
    if not steps:
        return 0.0, 1.0
    low, high = min(steps), max(steps)
    first = 0.0 if low < (high - low) / 10 else float(low)
    return first, first + _rounded_up(high - first)


def loss_name(history: MetricHistory) -> str | None:
    """Of the reported values, the one that the first chart shows."""
    derived = {"samples_per_s", "tokens_per_s", "data_wait"}
    names = [n for n in history.names() if n not in derived and not n.endswith("_s")]
    likely = [n for n in names if n == "loss"] + [n for n in names if "loss" in n.lower()]
    return next(iter(likely + names), None)


def _loss(history: MetricHistory, ground: _Ground) -> Plot:
    name = loss_name(history)
    if name is None:
        return _plot(ground, "Loss", [], labels.value)
    newest = labels.value(history.last(name), name)
    title = name.replace("_", " ").capitalize()
    return _plot(ground, title, [("", history.series(name), newest)], labels.value)


def _throughput(history: MetricHistory, ground: _Ground) -> Plot:
    name, unit = "tokens_per_s", "tok/s"
    if history.last(name) is None:
        name, unit = "samples_per_s", "samples/s"
    newest = history.last(name)
    curves = [("", history.series(name), f"{labels.count(newest)} {unit}")] if newest else []
    return _plot(ground, "Throughput", curves, labels.count, from_zero=True)


def _step_time(history: MetricHistory, ground: _Ground) -> Plot:
    named = (("step", "step_s"), ("data", "data_s"))
    curves = [
        (name, history.series(key), labels.seconds(newest))
        for name, key in named
        if (newest := history.last(key)) is not None
    ]
    return _plot(
        ground,
        "Step time",
        curves,
        lambda value: labels.seconds(value) if value else "0",
        from_zero=True,
    )


def _resources(picture: JobPicture, ground: _Ground) -> Plot:
    """GPU and its memory where there are GPUs, else the CPUs; of all workers together."""
    history = picture.history
    start, end = ground.start, ground.end
    name, label, mean = "cpu_percent", "CPU", False
    if history.workers("gpu_percent"):
        name, label, mean = "gpu_percent", "GPU", True
    total = history.total(name, mean=mean)
    if total is None:
        return Plot("Resources", empty="no sample yet")
    in_memory = labels.size(memory(picture.view.gang) or history.total("memory_bytes"))
    view = partial(history.total_view, name, start=start, end=end, mean=mean)
    curve = Curve("", f"{label} {total:.0f}%   memory {in_memory}", view)
    return Plot(
        "Resources", (curve,), start, end, Axis.TIME, ground.marks, _percent, from_zero=True
    )


def _percent(value: float) -> str:
    return f"{value:.0f}%"


def _plot(
    ground: _Ground,
    title: str,
    curves: Sequence[tuple[str, Series, str]],
    words: Callable[[float], str],
    *,
    from_zero: bool = False,
) -> Plot:
    start, end = ground.start, ground.end
    if ground.axis is Axis.STEP and curves:
        start, end = step_range(curves[0][1], start, end)
    drawn = tuple(
        Curve(name, newest, partial(series.view, start=start, end=end, axis=ground.axis))
        for name, series, newest in curves
    )
    return Plot(
        title, drawn, start, end, ground.axis, ground.marks, words, from_zero, _WITHOUT_STEPS
    )


def _rounded_up(span: float) -> float:
    """The next of about twelve lengths a decade."""
    length = 20.0
    while length < span:
        length *= 1.2
    return length
