"""`decide` by table, and each of its rules by one case."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dtp_engine.backend import Gang, Liveness, WorkerSight
from dtp_engine.decision import STOP_MARGIN, Action, Decision, Launch, Provision, Sight, Stop
from dtp_engine.endings import MOST_LOST_UNRUN, MOST_NO_GANG, backoff
from dtp_engine.jobs import (
    Attempt,
    Intent,
    Job,
    JobSpec,
    JobState,
    NodeRange,
    Placement,
    PlacementState,
    Reason,
    RetryPolicy,
)
from dtp_engine.lifecycle import LINGER, START_MARGIN, decide
from dtp_engine.room import Room
from dtp_trainer import wire
from dtp_trainer.wire import ExitCode, GangPhase

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
BEFORE = NOW - timedelta(minutes=1)
GRACE = timedelta(seconds=30)
ROOM, FULL = Room(2), Room(0, "needs 2 × 1 CPU, 0.5 free")  # noqa: RUF001
GROWS = replace(FULL, can_grow=True)
SPEC = JobSpec(name="digits", run="python train.py", nodes=NodeRange(2, 4), stop_grace=GRACE)
ALIVE, UNKNOWN = WorkerSight(Liveness.ALIVE), WorkerSight(Liveness.UNKNOWN)
SPOT = WorkerSight(Liveness.EXITED, 137, Reason.SPOT_INTERRUPTION)


def exited(code: int | None) -> WorkerSight:
    return WorkerSight(Liveness.EXITED, code)


def make_job(state: JobState, intent: Intent = Intent.RUN, **changes: Any) -> Job:
    placed = state in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING)
    job = Job(
        id="j1",
        name="digits",
        spec=SPEC,
        state=state,
        intent=intent,
        workers=2,
        created_at=BEFORE,
        created_by="ana",
        attempt=1 if placed else 0,
    )
    return replace(job, **changes)


def make_attempt(job: Job, workers: int = 2, **changes: Any) -> Attempt | None:
    """As the ledger holds it beside a job in that state."""
    if not job.attempt:
        return None
    stopping = job.state is JobState.STOPPING
    state = PlacementState.STOPPING if stopping else PlacementState.LAUNCHED
    placement = Placement(
        0, state, BEFORE, stop_at=NOW - timedelta(seconds=3) if stopping else None
    )
    placements = tuple(replace(placement, worker=number) for number in range(workers))
    running_at = BEFORE if job.state is JobState.RUNNING else None
    attempt = Attempt(job.id, job.attempt, BEFORE, "secret", placements, running_at)
    return replace(attempt, **changes)


def status(phase: GangPhase = GangPhase.RUNNING, **changes: Any) -> wire.Gang:
    gang = wire.Gang(1, 1, 0, "h:1", phase, 1, NOW.timestamp(), world_size=2, step=10)
    return replace(gang, **changes)


def see(
    workers: Sequence[WorkerSight] | Mapping[int, WorkerSight], told: wire.Gang | None = None
) -> Gang:
    numbered = workers if isinstance(workers, Mapping) else dict(enumerate(workers))
    return Gang(NOW, numbered, told)


def run(
    job: Job,
    gang: Gang | None,
    *,
    room: Room = ROOM,
    attempt: Attempt | None = None,
    trouble: str = "",
) -> Decision:
    sight = Sight(NOW, room, gang, trouble, "fresh")
    return decide(job, attempt or make_attempt(job), sight)


def names(decision: Decision) -> list[str]:
    return [event.name for event in decision.events]


# ------------------------------------------------------------------------- every state and intent


@dataclass(frozen=True)
class Row:
    """What becomes of a job in that state, when that is wanted of it."""

    state: JobState
    intent: Intent
    then: JobState
    actions: tuple[Action, ...] = ()
    room: Room = ROOM
    workers: WorkerSight | None = None
    """Each of the two; None: there are none."""
    kill: bool = False

    def __str__(self) -> str:
        seen = self.workers.liveness if self.workers else "none"
        return f"{self.state}-{self.intent}-{seen}" + "-kill" * self.kill


POLITE, AT_ONCE = Stop((0, 1), GRACE), Stop((0, 1), timedelta())
BOTH = Launch((0, 1))
LEFT = exited(ExitCode.PAUSED)
S, R, P, C = JobState, Intent.RUN, Intent.PAUSE, Intent.CANCEL

TABLE = [
    Row(S.QUEUED, R, S.STARTING, (BOTH,)),
    Row(S.QUEUED, R, S.QUEUED, room=FULL),
    Row(S.QUEUED, R, S.PROVISIONING, (Provision(2),), room=GROWS),
    Row(S.QUEUED, P, S.PAUSED),
    Row(S.QUEUED, C, S.CANCELLED),
    Row(S.PROVISIONING, R, S.STARTING, (BOTH,)),
    Row(S.PROVISIONING, R, S.PROVISIONING, (Provision(2),), room=GROWS),
    Row(S.PROVISIONING, R, S.QUEUED, room=FULL),
    Row(S.PROVISIONING, P, S.PAUSED),
    Row(S.PROVISIONING, C, S.CANCELLED),
    Row(S.STARTING, R, S.STARTING, workers=ALIVE),
    Row(S.STARTING, R, S.STARTING, workers=UNKNOWN),
    Row(S.STARTING, R, S.QUEUED, workers=LEFT),
    Row(S.STARTING, P, S.STOPPING, (POLITE,), workers=ALIVE),
    Row(S.STARTING, P, S.STOPPING, (POLITE,), workers=UNKNOWN),
    Row(S.STARTING, P, S.PAUSED, workers=LEFT),
    Row(S.STARTING, C, S.STOPPING, (POLITE,), workers=ALIVE),
    Row(S.STARTING, C, S.STOPPING, (AT_ONCE,), workers=ALIVE, kill=True),
    Row(S.STARTING, C, S.CANCELLED, workers=LEFT),
    Row(S.RUNNING, R, S.RUNNING, workers=ALIVE),
    Row(S.RUNNING, R, S.RUNNING, workers=UNKNOWN),
    Row(S.RUNNING, R, S.QUEUED, workers=LEFT),
    Row(S.RUNNING, P, S.STOPPING, (POLITE,), workers=ALIVE),
    Row(S.RUNNING, P, S.STOPPING, (POLITE,), workers=UNKNOWN),
    Row(S.RUNNING, P, S.PAUSED, workers=LEFT),
    Row(S.RUNNING, C, S.STOPPING, (POLITE,), workers=ALIVE),
    Row(S.RUNNING, C, S.STOPPING, (AT_ONCE,), workers=ALIVE, kill=True),
    Row(S.RUNNING, C, S.CANCELLED, workers=LEFT),
    Row(S.STOPPING, R, S.STOPPING, (POLITE,), workers=ALIVE),
    Row(S.STOPPING, R, S.STOPPING, (POLITE,), workers=UNKNOWN),
    Row(S.STOPPING, R, S.QUEUED, workers=LEFT),
    Row(S.STOPPING, P, S.STOPPING, (POLITE,), workers=ALIVE),
    Row(S.STOPPING, P, S.PAUSED, workers=LEFT),
    Row(S.STOPPING, C, S.STOPPING, (POLITE,), workers=ALIVE),
    Row(S.STOPPING, C, S.STOPPING, (AT_ONCE,), workers=ALIVE, kill=True),
    Row(S.STOPPING, C, S.CANCELLED, workers=LEFT),
    Row(S.PAUSED, R, S.STARTING, (BOTH,)),
    Row(S.PAUSED, R, S.QUEUED, room=FULL),
    Row(S.PAUSED, R, S.PROVISIONING, (Provision(2),), room=GROWS),
    Row(S.PAUSED, P, S.PAUSED),
    Row(S.PAUSED, C, S.CANCELLED),
    *(
        Row(final, intent, final)
        for final, intent in itertools.product((S.SUCCEEDED, S.FAILED, S.CANCELLED), Intent)
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_state_and_intent_give_the_next_state_and_the_actions(row: Row) -> None:
    """The table is the machine."""
    job = make_job(row.state, row.intent, kill=row.kill)
    gang = see([row.workers, row.workers]) if row.workers else None
    decision = run(job, gang, room=row.room)
    assert (decision.job.state, decision.actions) == (row.then, row.actions)


def test_table_has_every_state_and_intent() -> None:
    """A new state or intent must be given its rows."""
    assert {(r.state, r.intent) for r in TABLE} == set(itertools.product(JobState, Intent))


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_deciding_again_on_what_was_recorded_gives_the_same_actions(row: Row) -> None:
    """A controller that dies after recording loses nothing: the next one does what is due."""
    job = make_job(row.state, row.intent, kill=row.kill)
    gang = see([row.workers, row.workers]) if row.workers else None
    first = run(job, gang, room=row.room)
    again = run(first.job, see([]) if gang is None else gang, room=row.room, attempt=first.attempt)
    if first.job.state is not JobState.QUEUED:
        assert again.actions == first.actions
    assert not [event for event in again.events if event.name == "worker_gone"]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_every_change_of_state_is_told_once(row: Row) -> None:
    """The events named state form a chain from where the job was to where it is."""
    job = make_job(row.state, row.intent, kill=row.kill)
    gang = see([row.workers, row.workers]) if row.workers else None
    decision = run(job, gang, room=row.room)
    told = [e.text.partition(":")[0].split(" → ") for e in decision.events if e.name == "state"]
    path = [job.state, *(after for _, after in told)]
    assert [before for before, _ in told] == path[:-1]
    assert path[-1] == decision.job.state


# -------------------------------------------------------------------------------------- placing


def test_new_attempt_is_planned_before_it_is_launched() -> None:
    """What is launched is recorded first, with the secret of the attempt."""
    decision = run(make_job(S.QUEUED), None)
    assert decision.attempt is not None
    assert decision.attempt.secret == "fresh"
    assert [p.state for p in decision.attempt.placements] == [PlacementState.PLANNED] * 2
    assert decision.job.attempt == 1


def test_job_starts_with_what_fits_if_that_is_enough() -> None:
    """An elastic job does not wait for its last worker."""
    decision = run(make_job(S.QUEUED, workers=4), None, room=Room(3, "needs more"))
    assert decision.actions == (Launch((0, 1, 2)),)


def test_planned_worker_that_was_never_seen_is_launched_again() -> None:
    """Launching is idempotent, so a lost launch costs nothing."""
    job = make_job(S.STARTING)
    planned = run(make_job(S.QUEUED), None).attempt
    decision = run(job, see({0: ALIVE}), attempt=planned)
    assert decision.actions == (Launch((1,)),)


def test_retry_waits_for_its_time() -> None:
    """Room does not shorten a backoff."""
    job = make_job(S.QUEUED, retry_at=NOW + timedelta(seconds=1), reason=Reason.RETRYING)
    assert run(job, None).job == job


def test_attempt_runs_when_its_ranks_do() -> None:
    """The first generation makes RUNNING, and uses up the step to start from."""
    job = make_job(S.STARTING, resume_from=120)
    decision = run(job, see([ALIVE, ALIVE], status()))
    assert decision.job.state is S.RUNNING
    assert decision.job.started_at == NOW
    assert decision.job.resume_from is None
    assert decision.attempt is not None
    assert decision.attempt.running_at == NOW


def test_gang_that_never_forms_is_stopped_and_tried_again() -> None:
    """Workers that do nothing hold no machines for ever."""
    job = make_job(S.STARTING)
    created = NOW - SPEC.watchdog.start_within - START_MARGIN - timedelta(seconds=1)
    attempt = make_attempt(job, created_at=created)
    stopped = run(job, see([ALIVE, ALIVE]), attempt=attempt)
    assert stopped.actions == (POLITE,)
    after = run(stopped.job, see([exited(137)] * 2), attempt=stopped.attempt)
    assert (after.job.state, after.job.reason) == (S.QUEUED, Reason.RETRYING)


def test_silent_workers_are_stopped_when_the_gang_before_them_is_gone() -> None:
    """Also in a job that ran: nobody is left who could form a gang."""
    job = make_job(S.RUNNING)
    attempt = make_attempt(job)
    assert attempt is not None
    silent = NOW - SPEC.watchdog.start_within - START_MARGIN - timedelta(seconds=1)
    gone = replace(attempt.placements[0], state=PlacementState.GONE, ended_at=silent, exit_code=137)
    later = (replace(attempt.placements[1], worker=n, planned_at=silent) for n in (1, 2))
    attempt = replace(attempt, placements=(gone, *later))
    told = status(members=(wire.Member(0, "h", 1, 0, leaving=False),))
    decision = run(job, see({1: ALIVE, 2: ALIVE}, told), attempt=attempt)
    assert decision.actions == (Stop((1, 2), GRACE),)
    assert decision.job.reason is Reason.START_TIMEOUT


# -------------------------------------------------------------------------------------- scaling


def test_scaling_up_launches_the_difference_in_the_same_attempt() -> None:
    """New workers get new numbers and join the gang."""
    decision = run(make_job(S.RUNNING, workers=4), see([ALIVE, ALIVE], status()))
    assert decision.actions == (Launch((2, 3)),)
    assert decision.job.attempt == 1


def test_scaling_down_stops_the_newest_workers() -> None:
    """With grace, so that they checkpoint."""
    job = make_job(S.RUNNING, spec=replace(SPEC, nodes=NodeRange(1, 4)), workers=1)
    decision = run(job, see([ALIVE, ALIVE], status()))
    assert decision.actions == (Stop((1,), GRACE),)
    assert decision.job.state is S.RUNNING


def test_scaling_down_keeps_the_leader() -> None:
    """Losing it would cost an election."""
    job = make_job(S.RUNNING, spec=replace(SPEC, nodes=NodeRange(1, 4)), workers=1)
    decision = run(job, see([ALIVE, ALIVE], status(leader=1)))
    assert decision.actions == (Stop((0,), GRACE),)


def test_scaling_up_without_room_says_so_and_goes_on() -> None:
    """The gang trains with what it has."""
    decision = run(make_job(S.RUNNING, workers=4), see([ALIVE, ALIVE], status()), room=FULL)
    assert decision.actions == ()
    assert (decision.job.state, decision.job.reason) == (S.RUNNING, Reason.NO_CAPACITY)


def test_worker_that_left_as_asked_is_not_replaced() -> None:
    """A scale-down is no loss."""
    job = make_job(S.RUNNING, spec=replace(SPEC, nodes=NodeRange(1, 4)), workers=1)
    asked = run(job, see([ALIVE, ALIVE], status()))
    decision = run(asked.job, see([ALIVE, LEFT], status()), attempt=asked.attempt)
    assert decision.actions == ()
    assert decision.attempt is not None
    assert len(decision.attempt.staying) == 1


# -------------------------------------------------------------------------------------- losses


def test_lost_worker_is_replaced_by_a_new_number() -> None:
    """The gang goes on meanwhile; the first loss is answered at once."""
    decision = run(make_job(S.RUNNING), see([ALIVE, exited(137)], status()))
    assert decision.actions == (Launch((2,)),)
    assert names(decision) == ["worker_gone", "launch"]


def test_repeated_losses_are_replaced_more_slowly() -> None:
    """The second in ten minutes waits a second."""
    job = make_job(S.RUNNING)
    attempt = make_attempt(job, workers=3)
    decision = run(job, see([exited(137), exited(137), ALIVE], status()), attempt=attempt)
    assert decision.actions == ()
    assert decision.job.reason is Reason.WORKER_LOST


def test_spot_interruption_is_counted_apart() -> None:
    """A preemption is no error."""
    decision = run(make_job(S.RUNNING), see([ALIVE, SPOT], status()))
    assert (decision.job.preemptions, decision.job.errors_used) == (1, 0)


def test_preemption_budget_ends_the_job_when_too_few_are_left() -> None:
    """A finite budget is kept."""
    spec = replace(SPEC, retry=RetryPolicy(on_preemption=0))
    stopped = run(make_job(S.RUNNING, spec=spec), see([ALIVE, SPOT], status()))
    assert stopped.job.state is S.STOPPING
    after = run(stopped.job, see([LEFT, SPOT]), attempt=stopped.attempt)
    assert (after.job.state, after.job.reason) == (S.FAILED, Reason.SPOT_INTERRUPTION)


def test_all_preempted_goes_back_to_the_queue_without_backoff() -> None:
    """Machines that were taken back say nothing about the job."""
    job = run(make_job(S.RUNNING), see([SPOT, SPOT], status())).job
    assert (job.state, job.reason, job.retry_at) == (S.QUEUED, Reason.SPOT_INTERRUPTION, None)


def test_all_lost_is_tried_again_with_growing_backoff() -> None:
    """The first time at once, then more and more slowly."""
    waits = []
    for before in range(4):
        job = make_job(S.RUNNING, last_failures=("LOST @ step 10",) * before)
        after = run(job, see([exited(137)] * 2, status())).job
        assert (after.state, after.reason) == (S.QUEUED, Reason.RETRYING)
        assert after.retry_at is not None
        waits.append(after.retry_at - NOW)
    assert waits == [backoff(n) for n in (1, 2, 3, 4)]


def test_long_run_clears_the_record_of_losses() -> None:
    """A loss a day is not ten in a row."""
    job = make_job(S.RUNNING, last_failures=("LOST @ step 10",) * 9)
    attempt = make_attempt(job, running_at=NOW - timedelta(hours=1))
    after = run(job, see([exited(137)] * 2, status()), attempt=attempt).job
    assert after.last_failures == ("LOST @ step 10",)


def test_workers_that_always_die_before_they_run_end_the_job() -> None:
    """Patience without progress has an end."""
    failures = ("LOST before it ran",) * (MOST_LOST_UNRUN - 1)
    after = run(make_job(S.STARTING, last_failures=failures), see([exited(137)] * 2)).job
    assert (after.state, after.reason) == (S.FAILED, Reason.WORKER_LOST)


def test_gang_that_does_not_come_together_ends_the_job_at_last() -> None:
    """Three attempts, each with its own time, are enough."""
    failures = ("NO_GANG before it ran",) * (MOST_NO_GANG - 1)
    sight = see([exited(ExitCode.NO_GANG)] * 2)
    after = run(make_job(S.STARTING, last_failures=failures), sight).job
    assert (after.state, after.reason) == (S.FAILED, Reason.START_TIMEOUT)


def test_ended_gang_is_not_filled_up_again() -> None:
    """Its workers leave one after the other."""
    told = status(GangPhase.ENDED, outcome=0)
    assert run(make_job(S.RUNNING), see([ALIVE, exited(0)], told)).actions == ()


def test_worker_that_lingers_after_the_end_is_asked_to_leave() -> None:
    """An agent that forgot to exit holds no machine for ever."""
    ended = (NOW - LINGER - timedelta(seconds=1)).timestamp()
    told = status(GangPhase.ENDED, outcome=0, updated=ended)
    decision = run(make_job(S.RUNNING), see([ALIVE, exited(0)], told))
    assert decision.actions == (Stop((0,), GRACE),)


# -------------------------------------------------------------------------------------- stopping


def test_late_worker_is_killed_from_outside() -> None:
    """Grace has an end, and the reader is told who did not keep it."""
    job = make_job(S.STOPPING, Intent.PAUSE)
    attempt = make_attempt(job)
    assert attempt is not None
    asked = NOW - GRACE - STOP_MARGIN - timedelta(seconds=1)
    late = replace(attempt.placements[1], stop_at=asked)
    decision = run(
        job,
        see([ALIVE, ALIVE]),
        attempt=replace(attempt, placements=(attempt.placements[0], late)),
    )
    assert decision.actions == (Stop((0,), GRACE), Stop((1,), timedelta()))
    assert decision.job.detail.startswith("worker 1 did not leave within 30 s")


def test_resume_while_stopping_waits_for_the_last_worker() -> None:
    """Never two attempts at once; then the next one starts from the checkpoint."""
    job = make_job(S.STOPPING, Intent.RUN)
    attempt = make_attempt(job)
    waiting = run(job, see([LEFT, ALIVE]), attempt=attempt)
    assert waiting.job.state is S.STOPPING
    after = run(waiting.job, see([LEFT, LEFT]), attempt=waiting.attempt)
    assert (after.job.state, after.job.last_failures) == (S.QUEUED, ())


def test_worker_that_was_never_launched_is_stopped_too() -> None:
    """So that a launch that is still under way comes to nothing."""
    planned = run(make_job(S.QUEUED), None).attempt
    decision = run(make_job(S.STARTING, Intent.CANCEL), see([]), attempt=planned)
    assert decision.actions == (POLITE,)


# -------------------------------------------------------------------------------------- unseen


def test_unseen_workers_are_told_once_and_left_alone() -> None:
    """Amber with the time since when; nothing is done."""
    first = run(make_job(S.RUNNING, workers=4), None, trouble="no route to host")
    assert first.actions == ()
    assert first.job.detail == "not seen since 12:00:00 UTC: no route to host"
    second = run(first.job, None, attempt=first.attempt)
    assert (names(first), names(second)) == (["unseen"], [])


def test_workers_seen_again_are_told() -> None:
    """And the detail is as if nothing had been."""
    first = run(make_job(S.RUNNING), see([ALIVE, UNKNOWN], status()))
    again = run(first.job, see([ALIVE, ALIVE], status()), attempt=first.attempt)
    assert (names(again), again.job.detail) == (["seen_again"], "")


def test_one_unknown_worker_suspends_all_rules_but_the_operators_word() -> None:
    """A loss beside it is recorded, and answered when the rest is seen."""
    decision = run(make_job(S.RUNNING), see([exited(137), UNKNOWN], status()))
    assert decision.actions == ()
    assert names(decision) == ["worker_gone", "unseen"]


# ----------------------------------------------------------------------------- events of the gang


def gang_events(*numbers: int) -> tuple[wire.GangEvent, ...]:
    return tuple(wire.GangEvent(n, NOW.timestamp(), "checkpoint", f"e{n}") for n in numbers)


def test_events_of_the_gang_are_taken_over_once() -> None:
    """By number; the last one is recorded in the same commit."""
    first = run(make_job(S.RUNNING), see([ALIVE, ALIVE], status(events=gang_events(1, 2))))
    sight = see([ALIVE, ALIVE], status(events=gang_events(1, 2, 3)))
    second = run(first.job, sight, attempt=first.attempt)
    assert [e.text for e in (*first.events, *second.events)] == ["e1", "e2", "e3"]
    assert second.job.gang_events_seen == 3


def test_events_that_nobody_took_over_are_counted() -> None:
    """A gap is told, not hidden."""
    decision = run(make_job(S.RUNNING), see([ALIVE, ALIVE], status(events=gang_events(5, 6))))
    assert names(decision) == ["events_missed", "checkpoint", "checkpoint"]
