"""Words for people: one home, pure."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from dtp_engine.jobs import Intent, Job, JobSpec, JobState, Reason
from dtp_trainer import wire
from dtp_tui import labels

NOW = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)


def job(state: JobState = JobState.RUNNING, intent: Intent = Intent.RUN, **more: object) -> Job:
    given: dict[str, object] = {"workers": 2, "created_at": NOW, "created_by": "ana@laptop"} | more
    spec = JobSpec(name="digits", run="python train.py")
    return Job(id="abcdefgh", name="digits", spec=spec, state=state, intent=intent, **given)  # type: ignore[arg-type]


def gang(members: int, phase: str = "running", **more: object) -> wire.Gang:
    there = tuple(wire.Member(i, "127.0.0.1", 1, i, leaving=False) for i in range(members))
    given = {
        "term": 1,
        "leader": 0,
        "address": "127.0.0.1:1",
        "generation": 1,
        "updated": 0.0,
    } | more
    return wire.Gang(attempt=1, phase=phase, members=there, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", JobState)
def test_every_state_has_a_label(state: JobState) -> None:
    """Each state has a word and a glyph one cell wide."""
    assert labels.STATES[state].word
    assert len(labels.STATES[state].glyph) == 1


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_words(reason: Reason) -> None:
    """No reason is shown by its internal name."""
    assert labels.REASONS[reason]


def test_headline_says_what_is_wanted() -> None:
    """What an operator asked for shows before it has happened."""
    assert labels.headline(job(intent=Intent.PAUSE)).word == "Pausing…"
    assert labels.headline(job(intent=Intent.CANCEL)).word == "Stopping…"
    assert labels.headline(job(intent=Intent.CANCEL, kill=True)).word == "Killing…"
    assert labels.headline(job(JobState.PAUSED, Intent.PAUSE)).word == "Paused"
    assert labels.headline(job(JobState.CANCELLED, Intent.CANCEL)).word == "Cancelled"


def test_headline_names_both_ends_of_a_scaling() -> None:
    """A gang that leaves its ranks to become larger or smaller is shown as scaling."""
    assert (
        labels.headline(job(workers=4), gang(2, "draining", world_size=2)).word == "Scaling 2 → 4"
    )
    assert (
        labels.headline(job(workers=1), gang(2, "draining", world_size=2)).word == "Scaling 2 → 1"
    )
    assert (
        labels.headline(job(workers=2), gang(2, "draining", world_size=2)).word == "Checkpointing…"
    )


def test_headline_of_a_gang_without_room_to_grow() -> None:
    """A job that runs with fewer workers than wished is running."""
    assert labels.headline(job(workers=4), gang(2, world_size=2)).word == "Running"


def test_headline_of_a_waiting_job_gives_the_kind_of_wait() -> None:
    """Waiting for room and waiting to retry look different."""
    assert "room" in labels.headline(job(JobState.QUEUED, reason=Reason.NO_CAPACITY)).word
    assert "Retry" in labels.headline(job(JobState.QUEUED, reason=Reason.RETRYING)).word
    assert labels.headline(job(JobState.QUEUED)).word == "Queued"


def test_headline_of_a_gang_that_forms_again() -> None:
    """A generation after a failure is a recovery."""
    assert labels.headline(job(), gang(2, "forming", restarts=1)).word == "Recovering…"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42s"),
        (9.3, "9.3s"),
        (9.96, "10s"),
        (59.7, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (100800, "1d04h"),
        (-3, "0.00s"),
        (math.inf, "—"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    """A duration has at most two units."""
    assert labels.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (1234, "1.23k"),
        (45_600_000, "45.6M"),
        (0.5, "0.5"),
        (None, "—"),
    ],
)
def test_count(number: float | None, text: str) -> None:
    """A count has three significant digits."""
    assert labels.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (16 * 2**30, "16.0 GiB"), (None, "—")]
)
def test_size(number: int | None, text: str) -> None:
    """Bytes are shown in binary units."""
    assert labels.size(number) == text


def test_value_never_hides_a_broken_loss() -> None:
    """NaN and infinities are shown as such."""
    assert labels.value(math.nan) == "NaN"
    assert labels.value(-math.inf) == "-∞"
    assert labels.value(0.973, "accuracy") == "97.3%"
    assert labels.value(0.00001) == "1.00e-05"


def test_unknown_money_is_not_zero() -> None:
    """A price that nobody knows is never shown as free."""
    assert labels.money(None) == labels.UNKNOWN
    assert labels.money(0.0) == "$0.00"
    assert labels.money(0.0123) == "$0.0123"


def test_why_prefers_the_detail() -> None:
    """What the system said comes before the name of the kind of reason."""
    failed = job(JobState.FAILED, reason=Reason.WORKER_FAILED, detail="ValueError: no")
    assert labels.why(failed) == "ValueError: no"
    assert labels.why(job(JobState.FAILED, reason=Reason.HANG)) == "no step for too long"
    assert labels.why(job(reason=Reason.USER)) == ""


def test_span_and_elapsed() -> None:
    """A span reads as a job file writes it."""
    assert labels.span(timedelta(seconds=90)) == "1m30s"
    assert labels.span(timedelta(milliseconds=1500)) == "1s500ms"
    assert labels.elapsed(job(started_at=NOW - timedelta(seconds=75)), NOW) == "1m15s"
    assert labels.elapsed(job(), NOW) == labels.UNKNOWN


SHARES = {"backward": 0.4, "comm": 0.09, "data": 0.02, "forward": 0.38, "optimizer": 0.1}


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, ""),
        ({"step_s": 0.041}, "41 ms:"),
        (
            {"step_s": 0.041, "phases": SHARES, "verdict": "comm-bound"},
            "41 ms: forward 38% backward 40% comm 9% optimizer 10% → comm-bound",
        ),
        (
            {"step_s": 1.5, "phases": {"forward": 0.998, "data": 0.002}, "verdict": "compute"},
            "1.5 s: forward 100% → compute",
        ),
    ],
)
def test_where_a_step_takes_its_time(known: dict[str, object], words: str) -> None:
    """The four largest phases in the order of a step, and what it is bound by."""
    assert labels.step_time(gang(2, **known)) == words


def test_a_step_time_fits_a_terminal() -> None:
    """At its longest it leaves room for the name of the line."""
    shares = dict.fromkeys(("checkpoint", "optimizer", "backward", "forward"), 0.25)
    known = {"step_s": 0.1234, "phases": shares, "verdict": "straggler rank 1023"}
    assert len(f"  {'step':<10} {labels.step_time(gang(2, **known))}") <= 100


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [("mfu", 0.4123, "41.2%"), ("peak_memory_bytes", 3 << 30, "3.0 GiB"), ("mfu", 1.5, "1.5")],
)
def test_derived_values_have_their_units(name: str, number: float, words: str) -> None:
    """Shares as percentages, bytes as sizes."""
    assert labels.value(number, name) == words
