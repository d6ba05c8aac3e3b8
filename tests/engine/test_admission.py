"""What a request does to a job, or why it is refused; and who is offered room first."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dtp_engine.admission import Admission, admit
from dtp_engine.backend import Capacity, Machine
from dtp_engine.jobs import (
    Intent,
    Job,
    JobSpec,
    JobState,
    NodeRange,
    Request,
    RequestKind,
    Resources,
)
from dtp_engine.room import Rooms, in_order

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
GIB = 1 << 30


def make_job(state: JobState = JobState.RUNNING, **changes: Any) -> Job:
    spec = JobSpec(name="digits", run="python train.py", nodes=NodeRange(1, 4))
    return replace(Job("j1", "digits", spec, state, Intent.RUN, 2, NOW, "ana"), **changes)


def ask(job: Job, kind: RequestKind, **values: Any) -> Admission:
    return admit(job, Request("k1", kind, job.id, "ana", NOW, **values), NOW)


@pytest.mark.parametrize(
    ("kind", "values", "changes"),
    [
        (RequestKind.PAUSE, {}, {"intent": Intent.PAUSE}),
        (RequestKind.SCALE, {"workers": 4}, {"workers": 4}),
        (RequestKind.STOP, {}, {"intent": Intent.CANCEL}),
        (RequestKind.KILL, {}, {"intent": Intent.CANCEL, "kill": True}),
    ],
)
def test_request_changes_what_is_wanted_and_nothing_else(
    kind: RequestKind, values: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Where the job is follows later."""
    job = make_job()
    admission = ask(job, kind, **values)
    assert admission.job == replace(job, **changes)
    assert admission.answer.refusal is None
    assert admission.event is not None
    assert admission.event.actor == "ana"


def test_resume_of_a_paused_job_may_name_a_step() -> None:
    """The next attempt starts from there."""
    job = make_job(JobState.PAUSED, intent=Intent.PAUSE)
    admission = ask(job, RequestKind.RESUME, from_step=120)
    assert (admission.job.intent, admission.job.resume_from) == (Intent.RUN, 120)


def test_resume_of_a_job_that_waits_to_retry_tries_now() -> None:
    """An operator need not sit out a backoff."""
    job = make_job(JobState.QUEUED, retry_at=NOW + timedelta(minutes=5))
    assert ask(job, RequestKind.RESUME).job.retry_at is None


@pytest.mark.parametrize(
    ("job", "kind", "values", "refusal"),
    [
        (make_job(), RequestKind.RESUME, {}, "digits is RUNNING already"),
        (make_job(), RequestKind.RESUME, {"from_step": 3}, "pause it first"),
        (make_job(), RequestKind.SCALE, {"workers": 7}, "may have 1..4 workers, not 7"),
        (make_job(), RequestKind.SCALE, {"workers": 0}, "may have 1..4 workers, not 0"),
        (make_job(JobState.SUCCEEDED), RequestKind.PAUSE, {}, "has succeeded already"),
        (make_job(JobState.FAILED), RequestKind.STOP, {}, "has failed already"),
        (make_job(JobState.CANCELLED), RequestKind.RESUME, {}, "has been cancelled already"),
        (make_job(intent=Intent.CANCEL), RequestKind.PAUSE, {}, "is being cancelled"),
        (make_job(intent=Intent.CANCEL), RequestKind.RESUME, {}, "is being cancelled"),
    ],
)
def test_request_that_cannot_be_is_refused_in_one_line(
    job: Job, kind: RequestKind, values: dict[str, Any], refusal: str
) -> None:
    """With the reason, and no change."""
    admission = ask(job, kind, **values)
    assert refusal in (admission.answer.refusal or "")
    assert (admission.job, admission.event) == (job, None)


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        (make_job(JobState.PAUSED, intent=Intent.PAUSE), RequestKind.PAUSE),
        (make_job(JobState.CANCELLED, intent=Intent.CANCEL), RequestKind.STOP),
    ],
)
def test_what_is_so_already_is_granted_in_silence(job: Job, kind: RequestKind) -> None:
    """Asking twice is no error and no event."""
    admission = ask(job, kind)
    assert (admission.job, admission.event, admission.answer.refusal) == (job, None, None)


def test_polite_stop_does_not_call_off_a_kill() -> None:
    """A cancel only becomes more urgent."""
    killed = ask(make_job(), RequestKind.KILL).job
    assert ask(killed, RequestKind.STOP).job.kill


# ------------------------------------------------------------------------------------------- room


def waiting(name: str, cpus: float, **changes: Any) -> Job:
    spec = JobSpec(name=name, run="x", resources=Resources(cpus=cpus), nodes=NodeRange(1, 1))
    job = replace(make_job(JobState.QUEUED), id=name, name=name, spec=spec, workers=1)
    return replace(job, **changes)


def capacity(free_cpus: float, *, cpus: float = 4, can_grow: bool = False) -> Capacity:
    machine = Machine("here", cpus, 8 * GIB, 0)
    return Capacity(NOW, (machine,), free_cpus, 8 * GIB, 0, Resources(0, cpus, 8 * GIB), can_grow)


def test_placed_jobs_come_first_then_priority_then_age() -> None:
    """So that a job that lacks a worker never waits behind one that waits for its machines."""
    old = waiting("old", 1)
    young = waiting("young", 1, created_at=NOW + timedelta(seconds=1))
    urgent = waiting("urgent", 1, created_at=NOW + timedelta(seconds=2))
    urgent = replace(urgent, spec=replace(urgent.spec, priority=90))
    placed = waiting("placed", 1, state=JobState.RUNNING, created_at=NOW + timedelta(seconds=3))
    ordered = in_order([young, urgent, placed, old])
    assert [job.name for job in ordered] == ["placed", "urgent", "old", "young"]


def test_room_is_kept_for_the_first_that_waits() -> None:
    """A large job is not overtaken for ever by small ones."""
    rooms = Rooms(capacity(2))
    large = rooms.offer(waiting("large", 4), present=0)
    small = rooms.offer(waiting("small", 1), present=0)
    assert (large.workers, large.detail) == (0, "needs 1 × 4 CPU, 2 free")  # noqa: RUF001
    assert (small.workers, small.detail) == (0, "waits behind large")


def test_job_larger_than_everything_holds_nobody_up() -> None:
    """It waits for another machine; the others do not wait for it."""
    rooms = Rooms(capacity(2))
    rooms.offer(waiting("huge", 64), present=0)
    assert rooms.offer(waiting("small", 1), present=0).workers == 1


def test_room_that_was_taken_is_not_offered_again() -> None:
    """In one sweep, before the backend has counted it."""
    rooms = Rooms(capacity(1))
    job = waiting("one", 1)
    assert rooms.offer(job, present=0).workers == 1
    rooms.reserve(job, 1)
    assert rooms.offer(waiting("two", 1), present=0).workers == 0


def test_tenths_of_a_cpu_add_up() -> None:
    """Ten workers of a tenth fit on one CPU, whatever floating point says."""
    job = waiting("tenths", 0.1, workers=10)
    job = replace(job, spec=replace(job.spec, nodes=NodeRange(1, 10)))
    assert Rooms(capacity(0.1 * 3 + 0.7)).offer(job, present=0).workers == 10
