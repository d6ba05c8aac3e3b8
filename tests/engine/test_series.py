"""Series: what a chart is told of many samples."""

from __future__ import annotations

import dataclasses
import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtp_engine.series import Axis, Bucket, MarkKind, MetricHistory, Series, fold, sparkline
from dtp_trainer import wire


def window(at: float, step: int, *, worker: int = 0, rank: int = 0, **values: float) -> wire.Window:
    phases = {"step": {"min": 0.1, "median": 0.2, "max": 0.3}, "data": {"median": 0.05}}
    return wire.Window(at, 1, worker, rank, 2, step, 10, 0.5, 100, values, 640.0, None, phases)


def host(at: float, worker: int, cpu: float) -> wire.Host:
    return wire.Host(at, worker, cpu, 1_000, 8_000, (50.0, 100.0), (10, 30), (80, 80))


def filled(values: list[float], *, capacity: int = 1000) -> Series:
    series = Series("loss", capacity=capacity)
    for index, value in enumerate(values):
        series.add(float(index), index, value)
    return series


def test_a_view_keeps_every_extreme() -> None:
    """One spike among a thousand points is in the bucket of its column."""
    values = [1.0] * 1000
    values[437] = 99.0
    view = filled(values).view(10)
    assert len(view) == 10
    assert [bucket.high for bucket in view] == [1, 1, 1, 1, 99, 1, 1, 1, 1, 1]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 50))
def test_a_view_loses_no_point(values: list[float], columns: int) -> None:
    """Whatever the columns, the extremes of the view are those of the points, in order of time."""
    view = filled(values).view(columns)
    assert min(bucket.low for bucket in view) == min(values)
    assert max(bucket.high for bucket in view) == max(values)
    assert view[-1].last == values[-1]
    assert [bucket.index for bucket in view] == sorted({bucket.index for bucket in view})
    assert all(0 <= bucket.index < columns for bucket in view)


def test_a_view_looks_only_into_its_window() -> None:
    """Points outside [start, end] are not counted, and empty columns are absent."""
    view = filled([float(n) for n in range(100)]).view(4, start=50, end=54)
    assert view == (
        Bucket(0, 50, 50, 50),
        Bucket(1, 51, 51, 51),
        Bucket(2, 52, 52, 52),
        Bucket(3, 53, 54, 54),
    )
    assert filled([1.0, 2.0]).view(4, start=90, end=99) == ()


def test_a_full_series_thins_its_past_and_keeps_the_extremes() -> None:
    """However many points come, memory is bounded, the newest are exact and old spikes stay."""
    series = Series("loss", capacity=100)
    for index in range(10_000):
        series.add(float(index), index, 500.0 if index == 7 else float(index % 10))
    assert len(series) <= 101
    assert max(point.value for point in series.points()) == 500.0
    assert [p.at for p in series.points(since=9_970.0)] == [float(n) for n in range(9_971, 10_000)]


def test_late_points_are_put_in_their_place() -> None:
    """The log of a second worker may be read after the first's; time still goes forward."""
    series = Series("loss")
    for at in (1.0, 4.0, 2.0, 3.0):
        series.add(at, int(at), at * 10)
    assert [point.value for point in series.points()] == [10, 20, 30, 40]


def test_steps_trained_twice_count_once() -> None:
    """On the step axis a restart replaces what it trained again."""
    series = Series("loss")
    for at, step, value in ((1, 1, 9.0), (2, 2, 8.0), (3, 3, 7.0), (4, 2, 5.0), (5, 3, 4.0)):
        series.add(at, step, value)
    view = series.view(3, axis=Axis.STEP, start=1, end=3)
    assert [bucket.last for bucket in view] == [9.0, 5.0, 4.0]


def test_numbers_that_are_none_do_not_hide_the_others() -> None:
    """NaN and infinity are kept, and never become the bounds of a bucket that has a number."""
    series = filled([1.0, math.nan, 3.0, math.inf])
    (bucket,) = series.view(1)
    assert (bucket.low, bucket.high) == (1.0, 3.0)
    assert bucket.last == math.inf
    (lost,) = filled([math.nan]).view(1)
    assert math.isnan(lost.low)


def test_a_window_of_rank_0_is_the_jobs() -> None:
    """Values come from rank 0; the other workers add only their own phases."""
    history = MetricHistory()
    history.add(1, window(10.0, 5, loss=2.5))
    history.add(1, window(10.0, 5, worker=1, rank=1, loss=7.0))
    assert history.last("loss") == 2.5
    assert history.last("samples_per_s") == 640.0
    assert history.last("step_s") == 0.2
    assert history.last("data_wait") == pytest.approx(0.25)
    assert history.workers("step_s") == (0, 1)
    assert history.total_steps == 100


def test_resources_add_up_over_the_workers_that_still_report() -> None:
    """A worker that went away no longer counts in the total."""
    history = MetricHistory()
    for at in range(100):
        history.add(1, host(float(at), 0, 80.0))
    for at in range(50):
        history.add(1, host(float(at), 1, 120.0))
    assert history.total("cpu_percent") == 80.0
    assert history.total("gpu_percent", mean=True) == 75.0
    assert history.last("gpu_memory_bytes", 1) == 40.0
    view = history.total_view("cpu_percent", 10, start=0, end=100)
    assert [bucket.last for bucket in view[:5]] == [200.0] * 5
    assert view[-1].last == 80.0


def test_the_sensors_of_several_gpus_are_one_number() -> None:
    """Watts add up and the hottest card counts; one without the sensor is left out."""
    told = MetricHistory()
    sensors = {"gpu_watts": (300.0, 200.0, None), "gpu_celsius": (55.0, None, 71.0)}
    told.add(1, dataclasses.replace(host(1.0, 2, 50.0), **sensors))
    assert told.last("gpu_watts", 2) == 500.0
    assert told.last("gpu_celsius", 2) == 71.0
    assert not len(told.series("gpu_sm_mhz", 2))


def test_a_missed_column_does_not_make_the_sum_flicker() -> None:
    """A worker that did not sample within a column counts there with its last value."""
    even = [Bucket(i, 1, 1, 1) for i in range(0, 10, 2)]
    every = [Bucket(i, 2, 2, 2) for i in range(10)]
    assert {bucket.last for bucket in fold([even, every], math.fsum)} == {3.0}
    assert fold([], fmean) == ()


def test_events_become_marks_once() -> None:
    """The same event from the log and from gang.json is one mark; small talk is none."""
    history = MetricHistory()
    started = wire.GangEvent(1, 5.0, "generation_started", "generation 1: 2 workers", generation=1)
    history.add(1, started)
    history.add(1, started)
    history.add(1, wire.GangEvent(2, 6.0, "checkpoint", "checkpoint at step 10", step=10))
    history.add(1, wire.GangEvent(3, 7.0, "leader_elected", "worker 0 leads"))
    history.add(2, window(9.0, 11, loss=1.0))
    kinds = [mark.kind for mark in history.marks]
    assert kinds == [MarkKind.GENERATION, MarkKind.CHECKPOINT, MarkKind.ATTEMPT]
    assert history.attempt == 2


def test_an_unknown_name_is_an_empty_series() -> None:
    """Asking for what never came is not an error."""
    history = MetricHistory()
    assert history.last("loss") is None
    assert history.series("loss").view(10) == ()
    assert history.total("cpu_percent") is None
    assert history.newest_at is None


def test_a_sparkline_shows_the_shape() -> None:
    """Eight levels, calm for noise, nothing for nothing."""
    assert sparkline([1, 2, 3, 4]) == "▁▃▆█"
    assert sparkline([5.0, 5.0, 5.0]) == "▅▅▅"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(100)))) == 8
