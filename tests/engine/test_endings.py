"""How the end of an attempt is read: the gang's last word first, exit codes where there is none."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from dtp_engine.backend import Gang, Liveness, WorkerSight
from dtp_engine.decision import Sight
from dtp_engine.endings import End, read_ending
from dtp_engine.jobs import (
    Attempt,
    Intent,
    Job,
    JobSpec,
    JobState,
    Placement,
    PlacementState,
    Reason,
)
from dtp_engine.lifecycle import decide
from dtp_engine.room import Room
from dtp_trainer import wire
from dtp_trainer.wire import ExitCode, GangPhase

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
BEFORE = NOW - timedelta(minutes=1)


def ended(
    told: wire.Gang | None,
    codes: tuple[int | None, ...] = (137, 137),
    state: JobState = JobState.RUNNING,
    intent: Intent = Intent.RUN,
    errors_used: int = 0,
) -> Job:
    """A job whose workers were there a moment ago and have now exited with these codes."""
    spec = JobSpec(name="digits", run="python train.py")
    job = Job("j1", "digits", spec, state, intent, 1, BEFORE, "ana", 0, 1, errors_used=errors_used)
    placements = tuple(Placement(n, PlacementState.LAUNCHED, BEFORE) for n in range(len(codes)))
    attempt = Attempt("j1", 1, BEFORE, "secret", placements, running_at=BEFORE)
    seen = {n: WorkerSight(Liveness.EXITED, code) for n, code in enumerate(codes)}
    return decide(job, attempt, Sight(NOW, Room(0), Gang(NOW, seen, told))).job


def status(phase: GangPhase = GangPhase.ENDED, **changes: object) -> wire.Gang:
    gang = wire.Gang(1, 1, 0, "h:1", phase, 1, NOW.timestamp(), step=10)
    return wire.Gang.from_dict({**gang.to_dict(), **changes})  # type: ignore[no-any-return]


def gone(*codes: int | None, asked: bool = False, ran: bool = True) -> Attempt:
    stop_at = BEFORE if asked else None
    placements = tuple(
        Placement(n, PlacementState.GONE, BEFORE, stop_at, NOW, code)
        for n, code in enumerate(codes)
    )
    return Attempt("j1", 1, BEFORE, "secret", placements, BEFORE if ran else None)


@pytest.mark.parametrize(
    ("outcome", "state", "reason"),
    [
        (0, JobState.SUCCEEDED, None),
        (1, JobState.FAILED, Reason.WORKER_FAILED),
        (3, JobState.FAILED, Reason.WORKER_FAILED),
        (137, JobState.FAILED, Reason.WORKER_FAILED),
        (ExitCode.PAUSED, JobState.QUEUED, Reason.RETRYING),
        (ExitCode.NO_GANG, JobState.QUEUED, Reason.RETRYING),
        (ExitCode.FENCED, JobState.QUEUED, Reason.RETRYING),
        (ExitCode.HANG, JobState.FAILED, Reason.HANG),
        (ExitCode.MAX_DURATION, JobState.FAILED, Reason.MAX_DURATION),
        (ExitCode.SETUP_FAILED, JobState.FAILED, Reason.SETUP_FAILED),
    ],
)
def test_last_word_of_the_gang_decides(
    outcome: int, state: JobState, reason: Reason | None
) -> None:
    """Not the exit codes, which a kill may have spoilt."""
    told = status(outcome=int(outcome), detail="so it was")
    job = ended(told)
    assert (job.state, job.reason) == (state, reason)
    assert "so it was" in job.detail


def test_same_failure_again_and_again_has_its_own_reason() -> None:
    """The gang says that it saw no use in another try."""
    event = wire.GangEvent(7, NOW.timestamp(), "same_failure", "3 times the same")
    told = status(outcome=1, events=(event,))
    after = ended(told)
    assert (after.reason, after.exit_code) == (Reason.SAME_FAILURE, 1)


def test_success_without_a_step_is_said_to_be_one() -> None:
    """A script that did nothing is no success in silence."""
    event = wire.GangEvent(1, NOW.timestamp(), "no_steps", "took no step")
    told = status(outcome=0, events=(event,))
    after = ended(told)
    assert after.state is JobState.SUCCEEDED
    assert (after.reason, after.detail) == (Reason.NO_STEPS, "took no step")


@pytest.mark.parametrize("intent", Intent)
def test_job_that_finished_has_succeeded_whatever_was_asked(intent: Intent) -> None:
    """A pause or a cancel that came too late changes no fact."""
    told = status(outcome=0)
    job = ended(told, state=JobState.STOPPING, intent=intent)
    assert job.state is JobState.SUCCEEDED


def test_exit_codes_stand_in_for_a_last_word() -> None:
    """One worker that exits 0 speaks for its gang, though the other was killed on its way out."""
    assert ended(None, (0, 137)).state is JobState.SUCCEEDED


def test_budgets_are_added_up_when_an_attempt_ends() -> None:
    """The next attempt gets what is left."""
    after = ended(status(GangPhase.RUNNING, errors_used=2, hangs_used=1), errors_used=1)
    assert (after.errors_used, after.hangs_used, after.trained_s) == (3, 1, 60.0)


@pytest.mark.parametrize(
    ("attempt", "kind", "words"),
    [
        (gone(75, 75, asked=True), End.STOPPED, "left as asked"),
        (gone(75, 78, asked=True), End.STOPPED, "left as asked"),
        (gone(78, 78, asked=True), End.STOPPED, "stopped before it began"),
        (gone(75, 137, asked=True), End.STOPPED, "worker 1 was killed by signal 9"),
        (gone(75, 75), End.LEFT, "not asked by the controller"),
        (gone(137, None), End.LOST, "the platform names no exit code"),
        (gone(1, 1), End.LOST, "exited with 1"),
        (gone(76, 137), End.NO_GANG, "did not find each other"),
        (gone(80, 80, ran=False), End.SETUP_FAILED, "could not be set up"),
        (gone(80, 137), End.LOST, "killed by signal 9"),
        (gone(77, 77), End.HANG, "no step"),
        (gone(79, 79), End.MAX_DURATION, "as long as it may"),
    ],
)
def test_exit_codes_tell_how_a_silent_gang_ended(attempt: Attempt, kind: End, words: str) -> None:
    """Each in words that a reader at night understands."""
    asked = attempt.placements[0].stop_at is not None
    ending = read_ending(attempt, None, asked=asked, preempted=False)
    assert ending.kind is kind
    assert words in ending.words


KILLED = ("grace_over", 3, None)
SAVED = ("checkpoint", 2, 6)
BEHIND = "newest checkpoint known: step 6, the job was at step 10"


@pytest.mark.parametrize(
    ("told", "step", "ran", "words"),
    [
        ((), None, True, "left as asked"),
        ((), 10, True, "left as asked"),
        ((KILLED,), 10, True, "left as asked, killed after the grace"),
        ((KILLED,), 10, False, "left as asked"),
        ((("grace_over", 2, None),), 10, True, "left as asked"),
        (
            (("checkpoint", 1, 9), SAVED, KILLED),
            10,
            True,
            f"left as asked, killed after the grace; {BEHIND}",
        ),
        ((SAVED,), 6, True, "left as asked; newest checkpoint: step 6"),
    ],
)
def test_pause_without_a_last_word_claims_no_checkpoint(
    told: tuple[tuple[str, int, int | None], ...], step: int | None, ran: bool, words: str
) -> None:
    """What a leader that did not get to its last word had told is all that is said."""
    events = tuple(
        wire.GangEvent(n, NOW.timestamp(), name, "", generation, step=at)
        for n, (name, generation, at) in enumerate(told)
    )
    left = replace(status(GangPhase.FORMING), generation=3, step=step, events=events)
    ending = read_ending(gone(75, 75, asked=True, ran=ran), left, asked=True, preempted=False)
    assert (ending.kind, ending.words) == (End.STOPPED, words)


def test_machines_that_were_taken_back_are_no_loss() -> None:
    """The platform's reason counts more than the codes."""
    ending = read_ending(gone(137, 137), None, asked=False, preempted=True)
    assert ending.kind is End.PREEMPTED


def test_what_the_platform_says_of_the_last_worker_is_passed_on() -> None:
    """Why a set-up failed is known to nobody else."""
    attempt = gone(80, ran=False)
    ending = read_ending(attempt, None, asked=False, preempted=False, last_words="no secret TOKEN")
    assert (ending.kind, ending.words) == (End.SETUP_FAILED, "no secret TOKEN")
