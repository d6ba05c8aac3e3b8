"""decide(job, attempt, sight) → what is recorded, then done: the one state machine. Pure.

A decision takes over what was seen, applies the rules of the job's state (below, in the order in
which they count), and derives the actions from what is now recorded. Because actions follow from
the record alone, a controller that dies between recording and doing leaves nothing behind: the next
one reads the same record and derives the same actions. `docs/job-lifecycle.md` tells it to people.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import assert_never

from dtp_engine.decision import UNSEEN, Decision, Sight, Turn
from dtp_engine.endings import (
    FORGIVEN_AFTER,
    End,
    Ending,
    backoff,
    failures_after,
    is_hopeless,
    is_telling,
    read_ending,
)
from dtp_engine.jobs import Attempt, Intent, Job, JobState, Reason
from dtp_trainer import wire

START_MARGIN = timedelta(seconds=60)
"""Workers give up a gang that does not form by themselves; this much later they are stopped."""
LINGER = timedelta(seconds=30)
"""How long a worker may stay after its gang ended."""


def decide(job: Job, attempt: Attempt | None, sight: Sight) -> Decision:
    """`attempt` is the job's newest one, None before the first."""
    turn = Turn(job, attempt, sight)
    turn.take_over_gang_events()
    turn.take_over_sightings()
    _apply_rules(turn)
    return turn.decision()


# ------------------------------------------------------------------------ the rules of each state


def _apply_rules(turn: Turn) -> None:
    match turn.job.state:
        case JobState.QUEUED | JobState.PROVISIONING:
            _while_waiting(turn)
        case JobState.STARTING | JobState.RUNNING:
            _while_placed(turn)
        case JobState.STOPPING:
            _while_stopping(turn)
        case JobState.PAUSED:
            _while_paused(turn)
        case JobState.SUCCEEDED | JobState.FAILED | JobState.CANCELLED:
            pass
        case _:
            assert_never(turn.job.state)


def _while_waiting(turn: Turn) -> None:
    match turn.job.intent:
        case Intent.CANCEL:
            turn.become(JobState.CANCELLED, Reason.USER)
        case Intent.PAUSE:
            turn.become(JobState.PAUSED, Reason.USER)
        case Intent.RUN:
            if turn.job.retry_at is None or turn.job.retry_at <= turn.now:
                _seek_room(turn)
        case _:
            assert_never(turn.job.intent)


def _while_paused(turn: Turn) -> None:
    match turn.job.intent:
        case Intent.CANCEL:
            turn.become(JobState.CANCELLED, Reason.USER)
        case Intent.PAUSE:
            pass
        case Intent.RUN:
            turn.become(JobState.QUEUED)
            _seek_room(turn)
        case _:
            assert_never(turn.job.intent)


def _while_stopping(turn: Turn) -> None:
    if not turn.present:
        _conclude(turn)
    elif turn.is_blind:
        _hold(turn)
    else:
        turn.explain(turn.job.reason, _stopping_words(turn))


def _while_placed(turn: Turn) -> None:
    """In this order; the first rule that holds is the only one that acts."""
    if not turn.present:
        _conclude(turn)
    elif turn.job.intent is not Intent.RUN:
        _stop_all(turn, Reason.USER)
    elif turn.is_blind:
        _hold(turn)
    elif (ended_at := _gang_ended_at(turn)) is not None:
        _see_off(turn, ended_at)
    elif _is_preempted_too_often(turn.job) and len(turn.staying) < turn.job.spec.nodes.min:
        _stop_all(turn, Reason.SPOT_INTERRUPTION)
    elif _starts_too_late(turn):
        _stop_all(turn, Reason.START_TIMEOUT)
    else:
        _note_running(turn)
        _match_wish(turn)


# --------------------------------------------------------------------------------------- to place


def _seek_room(turn: Turn) -> None:
    """Start with what fits, if that is enough for a gang; the rest joins when there is room."""
    job, room = turn.job, turn.sight.room
    fits = min(job.workers, room.workers)
    if fits >= min(job.spec.nodes.min, job.workers):
        _begin_attempt(turn, fits)
    elif room.can_grow:
        turn.provision = job.workers
        turn.become(JobState.PROVISIONING, Reason.NO_CAPACITY, room.detail)
    else:
        turn.become(JobState.QUEUED, Reason.NO_CAPACITY, room.detail)


def _begin_attempt(turn: Turn, workers: int) -> None:
    number = turn.job.attempt + 1
    turn.attempt = Attempt(turn.job.id, number, turn.now, turn.sight.secret)
    turn.plan(workers)
    turn.job = replace(turn.job, attempt=number, retry_at=None)
    turn.become(JobState.STARTING, detail=_starting_words(turn))


def _match_wish(turn: Turn) -> None:
    missing = turn.job.workers - len(turn.staying)
    if missing > 0:
        _grow(turn, missing)
    elif missing < 0:
        _shrink(turn, -missing)
    else:
        turn.explain(None, _starting_words(turn))


def _grow(turn: Turn, missing: int) -> None:
    """Workers that are lost again and again are replaced more and more slowly."""
    since = turn.now - FORGIVEN_AFTER
    losses = [p.ended_at for p in turn.lost if p.ended_at is not None and p.ended_at > since]
    not_before = max(losses, default=turn.now) + backoff(len(losses))
    if _is_preempted_too_often(turn.job):
        turn.explain(Reason.SPOT_INTERRUPTION, "goes on with the workers that are left")
    elif turn.now < not_before:
        when = _clock(not_before)
        turn.explain(Reason.WORKER_LOST, f"{len(losses)} of late; the next one comes at {when}")
    else:
        _fill_up(turn, missing)


def _fill_up(turn: Turn, missing: int) -> None:
    room = turn.sight.room
    fits = min(missing, room.workers)
    if fits:
        turn.tell("launch", f"{_names(turn.plan(fits))} will join")
    if fits < missing:
        turn.provision = missing - fits if room.can_grow else 0
        turn.explain(Reason.NO_CAPACITY, room.detail)
    else:
        turn.explain(None, _starting_words(turn))


def _shrink(turn: Turn, surplus: int) -> None:
    """The newest workers go; the leader only when nobody else is left to go."""
    leader = turn.status.leader if turn.status else 0
    by_worth = sorted(turn.staying, key=lambda p: (p.worker != leader, p.worker))
    going = {p.worker for p in by_worth[-surplus:]}
    turn.ask_to_leave(going)
    turn.tell("stop", f"{_names(sorted(going))} asked to leave after a checkpoint")


# ---------------------------------------------------------------------------------------- to stop


def _stop_all(turn: Turn, reason: Reason) -> None:
    turn.ask_to_leave({p.worker for p in turn.present})
    turn.become(JobState.STOPPING, reason, _stopping_words(turn))


def _stopping_words(turn: Turn) -> str:
    if turn.overdue:
        late, grace = _names(p.worker for p in turn.overdue), turn.job.spec.stop_grace
        return f"{late} did not leave within {grace.total_seconds():g} s; killed from outside"
    if turn.job.kill:
        return f"killing {_count(len(turn.present))}"
    return f"{_count(len(turn.present))} still to leave"


# ----------------------------------------------------------------------------- while it is placed


def _hold(turn: Turn) -> None:
    """What cannot be seen is neither stopped nor restarted nor forgotten; only told, once."""
    if turn.job.detail.startswith(UNSEEN):
        return
    why = f": {turn.sight.trouble}" if turn.sight.trouble else ""
    turn.tell("unseen", f"the workers cannot be observed{why}")
    turn.explain(turn.job.reason, f"{UNSEEN} {_clock(turn.now)}{why}")


def _note_running(turn: Turn) -> None:
    """The ranks run: what the attempt was to start from has been used."""
    if turn.job.state is JobState.RUNNING or not _ranks_run(turn.status):
        return
    assert turn.attempt is not None
    turn.attempt = replace(turn.attempt, running_at=turn.attempt.running_at or turn.now)
    turn.job = replace(turn.job, started_at=turn.job.started_at or turn.now, resume_from=None)
    turn.become(JobState.RUNNING)


def _ranks_run(status: wire.Gang | None) -> bool:
    return status is not None and status.phase in (wire.GangPhase.RUNNING, wire.GangPhase.DRAINING)


def _gang_ended_at(turn: Turn) -> datetime | None:
    """A gang that ended is not filled up again, though some of its workers are still there."""
    if turn.status is not None and turn.status.phase == wire.GangPhase.ENDED:
        return datetime.fromtimestamp(turn.status.updated, UTC)
    ends = [p.ended_at for p in turn.placements if p.ended_at and is_telling(p.exit_code)]
    return min(ends, default=None)


def _see_off(turn: Turn, ended_at: datetime) -> None:
    lingering = sorted(p.worker for p in turn.staying)
    if lingering and turn.now > ended_at + LINGER:
        turn.ask_to_leave(lingering)
        turn.tell("stop", f"{_names(lingering)} asked to leave, as the gang has ended")


def _starts_too_late(turn: Turn) -> bool:
    since = _silent_since(turn)
    late = turn.job.spec.watchdog.start_within + START_MARGIN
    return since is not None and turn.now > since + late


def _silent_since(turn: Turn) -> datetime | None:
    """From when on there are workers, but no gang: none has formed in the attempt yet, or nobody
    who is here has ever been a member of it."""
    assert turn.attempt is not None
    if turn.job.state is JobState.STARTING:
        return None if _ranks_run(turn.status) else turn.attempt.created_at
    members = {member.worker for member in turn.status.members} if turn.status else set()
    if turn.status is None or any(p.worker in members for p in turn.present):
        return None
    return max(p.ended_at or p.planned_at for p in turn.placements)


def _is_preempted_too_often(job: Job) -> bool:
    most = job.spec.retry.on_preemption
    return most is not None and job.preemptions > most


# ------------------------------------------------------------------------- when nobody is present


def _conclude(turn: Turn) -> None:
    """The attempt is over. Success is a fact; all else is read in the light of the intent."""
    ending = _ending(turn)
    _close_attempt(turn, ending)
    if ending.kind is End.SUCCEEDED:
        _succeed(turn, ending)
        return
    match turn.job.intent:
        case Intent.CANCEL:
            turn.become(JobState.CANCELLED, Reason.USER, ending.words)
        case Intent.PAUSE:
            turn.become(JobState.PAUSED, Reason.USER, ending.words)
        case Intent.RUN:
            _go_on(turn, ending)
        case _:
            assert_never(turn.job.intent)


def _ending(turn: Turn) -> Ending:
    assert turn.attempt is not None
    taken = [s.reason in (Reason.SPOT_INTERRUPTION, Reason.NO_CAPACITY) for s in turn.gone_now]
    ending = read_ending(
        turn.attempt,
        turn.status,
        asked=turn.job.state is JobState.STOPPING,
        preempted=bool(taken) and all(taken),
        last_words=turn.gone_now[-1].detail if turn.gone_now else "",
    )
    if ending.kind is End.STOPPED and turn.job.reason is Reason.START_TIMEOUT:
        return Ending(End.NO_GANG, "the workers did not start in time")
    if ending.kind is End.STOPPED and turn.job.reason is Reason.SPOT_INTERRUPTION:
        return Ending(End.PREEMPTED, "too few workers were left")
    return ending


def _close_attempt(turn: Turn, ending: Ending) -> None:
    assert turn.attempt is not None
    turn.attempt = replace(turn.attempt, ended_at=turn.now, outcome=ending.words)
    turn.job = replace(
        turn.job,
        trained_s=turn.job.trained_s + _ran_s(turn.attempt),
        errors_used=turn.job.errors_used + (turn.status.errors_used if turn.status else 0),
        hangs_used=turn.job.hangs_used + (turn.status.hangs_used if turn.status else 0),
    )


def _succeed(turn: Turn, ending: Ending) -> None:
    events = turn.status.events if turn.status else ()
    without = [e.text for e in events if e.name == "no_steps"]
    if without:
        turn.become(JobState.SUCCEEDED, Reason.NO_STEPS, without[-1])
    else:
        turn.become(JobState.SUCCEEDED, detail=ending.words)


def _go_on(turn: Turn, ending: Ending) -> None:
    match ending.kind:
        case End.FAILED:
            _fail(turn, _failure_reason(turn), ending)
        case End.SETUP_FAILED:
            _fail(turn, Reason.SETUP_FAILED, ending)
        case End.HANG:
            _fail(turn, Reason.HANG, ending)
        case End.MAX_DURATION:
            _fail(turn, Reason.MAX_DURATION, ending)
        case End.STOPPED:
            turn.become(JobState.QUEUED, detail=ending.words)
        case End.PREEMPTED:
            _go_on_after_preemption(turn, ending)
        case End.LEFT | End.NO_GANG | End.LOST:
            _try_again(turn, ending)
        case End.SUCCEEDED:
            raise AssertionError("success is not up to the intent")
        case _:
            assert_never(ending.kind)


def _fail(turn: Turn, reason: Reason, ending: Ending) -> None:
    turn.job = replace(turn.job, exit_code=ending.code)
    turn.become(JobState.FAILED, reason, ending.words)


def _failure_reason(turn: Turn) -> Reason:
    """A gang says so when it gave up, its budget unspent, on what failed again and again."""
    last = turn.status.events[-3:] if turn.status else ()
    same = any(event.name == "same_failure" for event in last)
    return Reason.SAME_FAILURE if same else Reason.WORKER_FAILED


def _go_on_after_preemption(turn: Turn, ending: Ending) -> None:
    if _is_preempted_too_often(turn.job):
        _fail(turn, Reason.SPOT_INTERRUPTION, ending)
    else:
        turn.become(JobState.QUEUED, Reason.SPOT_INTERRUPTION, ending.words)


def _try_again(turn: Turn, ending: Ending) -> None:
    assert turn.attempt is not None
    step = turn.status.step if turn.status else None
    failures = failures_after(turn.job, ending, step=step, ran_s=_ran_s(turn.attempt))
    retry_at = turn.now + backoff(len(failures))
    turn.job = replace(turn.job, last_failures=failures)
    if is_hopeless(failures):
        no_gang = ending.kind is End.NO_GANG
        _fail(turn, Reason.START_TIMEOUT if no_gang else Reason.WORKER_LOST, ending)
    else:
        turn.job = replace(turn.job, retry_at=retry_at)
        words = f"{ending.words}; next try at {_clock(retry_at)}"
        turn.become(JobState.QUEUED, Reason.RETRYING, words)


def _ran_s(attempt: Attempt) -> float:
    if attempt.running_at is None or attempt.ended_at is None:
        return 0.0
    return (attempt.ended_at - attempt.running_at).total_seconds()


# -------------------------------------------------------------------------------------- words


def _starting_words(turn: Turn) -> str:
    if turn.job.state is JobState.RUNNING:
        return ""
    return f"{_count(len(turn.staying))} placed; the gang has not formed yet"


def _count(workers: int) -> str:
    return f"{workers} worker" if workers == 1 else f"{workers} workers"


def _names(workers: Iterable[int]) -> str:
    numbers = [str(number) for number in workers]
    return f"worker{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _clock(moment: datetime) -> str:
    return f"{moment:%H:%M:%S} UTC"
