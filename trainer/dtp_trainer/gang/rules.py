"""How the workers of an attempt form generations: the leader's state machine. Pure.

`step` takes what the leader heard and returns its new state and what has to be done. An input
changes facts only (`gang_facts`); then the rules of the phase, in the order in which they are
written here, are applied again and again until none of them fires. `leader.py` does what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias, assert_never

from dtp_trainer.gang import blame, effort, progress, roster, words
from dtp_trainer.gang.facts import absorb, grace_over, lose, removed, told
from dtp_trainer.gang.messages import RankExited
from dtp_trainer.gang.roster import Seat
from dtp_trainer.gang.state import (
    Cause,
    DismissWorker,
    DrainRanks,
    Drop,
    End,
    Input,
    KillRanks,
    Outputs,
    Phase,
    Prepare,
    Prepared,
    Resign,
    StartSeat,
    State,
)
from dtp_trainer.wire import ExitCode

SETTLE_S = 0.25
"""A pause of all arrives worker by worker and must not form a useless generation in between."""
GATHER_S = 3.0
"""How long those that are wished or expected are waited for when there are enough without them."""
CLEAR_S = 10.0
"""How long killed ranks may take to be gone before their worker counts as lost."""
SAME_FAILURE_LIMIT = 3
_WELL = (ExitCode.SUCCEEDED, ExitCode.PAUSED, ExitCode.MAX_DURATION)
"""Outcomes whose reason says by itself what is kept."""

Change: TypeAlias = tuple[State, Outputs]


def step(state: State, given: Input, now: float) -> Change:
    """The new state and what has to be done, in this order."""
    state = absorb(state, given, now)
    outputs: Outputs = ()
    while (change := _decide(state, now)) is not None:
        state, more = change
        outputs += more
    return state, outputs


def next_deadline(state: State, now: float) -> float | None:
    """When a `Tick` is due if nothing is heard until then."""
    return min((at for at in _deadlines(state) if at > now), default=None)


def _decide(state: State, now: float) -> Change | None:
    match state.phase:
        case Phase.GATHERING:
            return _gathering(state, now)
        case Phase.PREPARING:
            return _preparing(state, now)
        case Phase.RUNNING:
            return _running(state, now)
        case Phase.DRAINING:
            return _draining(state, now)
        case Phase.CLEARING:
            return _clearing(state, now)
        case Phase.ENDED | Phase.RESIGNED:
            return None
        case _:
            assert_never(state.phase)


def _deadlines(state: State) -> Iterator[float]:
    rules = state.rules
    match state.phase:
        case Phase.GATHERING:
            yield state.since + rules.start_within_s
            yield state.since + SETTLE_S
            yield from _some(_ready_at(state), rules.train_until)
        case Phase.RUNNING:
            yield from _some(_growth_at(state), _hang_at(state), rules.train_until)
        case Phase.DRAINING:
            yield state.since + rules.grace_s
        case Phase.CLEARING:
            yield state.since + CLEAR_S
        case Phase.PREPARING | Phase.ENDED | Phase.RESIGNED:
            pass
        case _:
            assert_never(state.phase)


def _some(*times: float | None) -> Iterator[float]:
    yield from (at for at in times if at is not None)


def _due(at: float | None, now: float) -> bool:
    return at is not None and now >= at


# ---------------------------------------------------------------------------------------- gathering


def _gathering(state: State, now: float) -> Change | None:
    if (change := _let_leavers_go(state, now)) is not None:
        return change
    if (change := _refuse_unfit(state, now)) is not None:
        return change
    if _due(state.rules.train_until, now):
        return _end(state, ExitCode.MAX_DURATION, words.time_is_up(state), now)
    if _due(_ready_at(state), now):
        return _prepare(state)
    if now >= state.since + state.rules.start_within_s:
        return _end(state, ExitCode.NO_GANG, _nobody_came(state), now)
    return None


def _let_leavers_go(state: State, now: float) -> Change | None:
    leaving = [worker for worker, peer in state.peers.items() if peer.leaving]
    staying = roster.staying(state.peers)
    if state.me in leaving and not staying and not _missing(state):
        return _end(state, ExitCode.PAUSED, words.left_text(state), now)
    others = [worker for worker in leaving if worker != state.me]
    if others:
        return _dismissed(state, others, ExitCode.PAUSED, words.left_text(state))
    if state.me in leaving and (now >= state.since + SETTLE_S or not state.settle):
        return replace(state, phase=Phase.RESIGNED), (Resign(words.left_text(state)),)
    return None


def _refuse_unfit(state: State, now: float) -> Change | None:
    unfit = next((peer for peer in state.peers.values() if peer.unfit), None)
    if unfit is None:
        return None
    text = f"worker {unfit.worker}: {unfit.unfit}"
    if not state.formed or unfit.worker == state.me:
        return _end(state, ExitCode.SETUP_FAILED, text, now)
    return _dismissed(state, [unfit.worker], ExitCode.SETUP_FAILED, text)


def _dismissed(state: State, workers: list[int], code: int, reason: str) -> Change:
    for worker in workers:
        state = removed(state, worker)
    return state, tuple(DismissWorker(worker, code, reason) for worker in workers)


def _missing(state: State) -> frozenset[int]:
    return state.expected - state.peers.keys()


def _ready_at(state: State) -> float | None:
    """When a generation may be formed of those that are here; None: of these never."""
    here = roster.staying(state.peers)[: state.rules.max_workers]
    if state.me not in state.peers or len(here) < max(1, state.rules.min_workers):
        return None
    earliest = max(state.not_before, state.since + SETTLE_S if state.settle else 0.0)
    if state.formed:
        return max(earliest, state.since + GATHER_S) if _missing(state) else earliest
    if len(here) >= min(state.wished, state.rules.max_workers):
        return earliest
    return max(earliest, max(peer.joined_at for peer in here) + GATHER_S)


def _prepare(state: State) -> Change:
    seats = _seating(state)
    state = replace(
        state, phase=Phase.PREPARING, seats=seats, ticket=state.ticket + 1, prepared=None
    )
    return state, (Prepare(state.ticket, seats[0].worker, state.generation + 1),)


def _seating(state: State) -> tuple[Seat, ...]:
    return roster.seating(roster.staying(state.peers), at_most=state.rules.max_workers)


def _nobody_came(state: State) -> str:
    here, needed = len(roster.staying(state.peers)), state.rules.min_workers
    within = f"within {state.rules.start_within_s:.0f} s"
    if here >= needed:
        return f"no generation could be formed {within}: {state.trouble or 'no answer'}"
    return f"{here} of at least {words.count(needed, 'worker')} came {within}"


# ---------------------------------------------------------------------------------------- preparing


def _preparing(state: State, now: float) -> Change | None:
    if _seating(state) != state.seats:  # Somebody came or went: what is prepared is void.
        return replace(state, phase=Phase.GATHERING), ()
    if state.prepared is None:
        return None
    return _open_generation(state, state.prepared, now)


def _open_generation(state: State, prepared: Prepared, now: float) -> Change:
    seats, generation = state.seats, prepared.generation
    size = roster.world_size(seats)
    state = replace(
        state,
        phase=Phase.RUNNING,
        since=now,
        generation=generation,
        formed=True,
        expected=frozenset(),
        settle=False,
        trouble="",
        busy=frozenset(seat.worker for seat in seats),
        exits=(),
        lost=(),
        cause=None,
        effort=effort.opened(state.effort, state.progress.newest),
        progress=progress.begun(state.progress, range(size), now),
        chronicle=state.chronicle.in_generation(generation),
    )
    ranks, workers = words.count(size, "rank"), words.count(len(seats), "worker")
    text = f"generation {generation}: {ranks} on {workers}"
    orders = tuple(
        StartSeat(
            seat,
            generation,
            size,
            len(seats),
            seats[0].host,
            prepared.master_port,
            state.restarts,
        )
        for seat in seats
    )
    return told(state, now, "generation_started", text, step=state.progress.step), orders


# ------------------------------------------------------------------------------------------ running


def _running(state: State, now: float) -> Change | None:
    if state.lost:
        return _kill(state, Cause.LOST, now)
    if any(blame.failed(exited) for exited in state.exits):
        return _kill(state, Cause.FAILED, now)
    if not state.busy:
        return _all_exited(state, now)
    if (cause := _reason_to_drain(state, now)) is not None:
        return _drain(state, cause, now)
    if _due(_hang_at(state), now):
        return _kill(state, Cause.HANG, now)
    return _dismiss_idle(state)


def _reason_to_drain(state: State, now: float) -> Cause | None:
    if any(exited.code == ExitCode.PAUSED for exited in state.exits):
        return Cause.LEFT
    if any(state.peers[seat.worker].leaving for seat in state.seats):
        return Cause.LEAVING
    if _due(state.rules.train_until, now):
        return Cause.DEADLINE
    return Cause.JOINING if _due(_growth_at(state), now) else None


def _dismiss_idle(state: State) -> Change | None:
    """Workers without a seat that leave, or that can start no ranks."""
    idle = state.peers.keys() - {seat.worker for seat in state.seats}
    for worker in sorted(idle):
        peer = state.peers[worker]
        if peer.leaving:
            return _dismissed(state, [worker], ExitCode.PAUSED, "left before it took part")
        if peer.unfit:
            return _dismissed(state, [worker], ExitCode.SETUP_FAILED, peer.unfit)
    return None


def _growth_at(state: State) -> float | None:
    """When to make room for workers that wait; None while none waits or there is no room."""
    seated = {seat.worker for seat in state.seats}
    here = roster.staying(state.peers)
    waiting = [peer for peer in here if peer.worker not in seated]
    if not waiting or len(seated) >= state.rules.max_workers:
        return None
    newest = max(peer.joined_at for peer in waiting)
    complete = len(here) >= min(state.wished, state.rules.max_workers)
    return newest if complete else newest + GATHER_S


def _hang_at(state: State) -> float | None:
    """When a step is overdue; None for a script that reports none, as nobody can tell."""
    rules, ranks = state.rules, state.progress.ranks.values()
    stalled, patience = progress.stalled_since(state.progress), rules.no_step_for_s
    if stalled is None or not state.progress.reporting:
        return None
    if patience is None:
        return None if state.progress.newest else stalled + rules.start_within_s
    if any(rank.step for rank in ranks):
        return stalled + patience
    return stalled + max(patience, rules.start_within_s)


def _all_exited(state: State, now: float) -> Change:
    if any(exited.code != ExitCode.SUCCEEDED for exited in state.exits):
        return _account(replace(state, cause=Cause.LEFT), now)
    return _succeed(state, now)


def _succeed(state: State, now: float) -> Change:
    size = roster.world_size(state.seats)
    text = f"{words.count(size, 'rank')} ended with 0"
    if state.progress.step is None and not state.progress.formed_group:
        text = "the script ended with 0 but took no step and formed no process group"
        state = told(state, now, "no_steps", text)
    return _end(state, ExitCode.SUCCEEDED, text, now)


# ------------------------------------------------------------------------- the end of a generation


def _drain(state: State, cause: Cause, now: float) -> Change:
    state = replace(state, phase=Phase.DRAINING, since=now, cause=cause)
    return state, tuple(DrainRanks(w, state.generation) for w in sorted(state.busy))


def _kill(state: State, cause: Cause, now: float) -> Change:
    hangs = cause is Cause.HANG
    stall = progress.stall(state.progress, now) if hangs else None
    state = replace(state, phase=Phase.CLEARING, since=now, cause=cause, stall=stall)
    return state, tuple(KillRanks(w, state.generation, hangs) for w in sorted(state.busy))


def _draining(state: State, now: float) -> Change | None:
    assert state.cause is not None
    if state.lost or not all(blame.left_as_asked(exited) for exited in state.exits):
        return _kill(state, state.cause, now)
    if not state.busy:
        return _account(state, now)
    if now >= state.since + state.rules.grace_s:
        return _kill(grace_over(state, now), state.cause, now)
    return None


def _clearing(state: State, now: float) -> Change | None:
    if not state.busy:
        return _account(state, now)
    if now < state.since + CLEAR_S:
        return None
    stuck = sorted(state.busy)
    for worker in stuck:
        state = lose(state, worker, now)
    return replace(state, busy=frozenset()), tuple(Drop(worker) for worker in stuck)


def _account(state: State, now: float) -> Change:
    """No rank of the generation is left: what becomes of the gang."""
    cause, suspect = state.cause, blame.culprit(state.exits)
    assert cause is not None
    if cause is Cause.FAILED and state.lost and (suspect is None or blame.lost_a_peer(suspect)):
        cause = Cause.LOST
    match cause:
        case Cause.FAILED:
            assert suspect is not None
            return _fail(state, suspect, now)
        case Cause.LEFT:
            return _fail(state, _first_to_leave(state), now)
        case Cause.LOST:
            return _gather(replace(state, restarts=state.restarts + 1), now)
        case Cause.HANG:
            return _hung(state, now)
        case Cause.DEADLINE | Cause.JOINING | Cause.LEAVING:
            return _drained(state, cause, suspect, now)
        case _:
            assert_never(cause)


def _drained(state: State, cause: Cause, suspect: RankExited | None, now: float) -> Change:
    complete = len(state.exits) == roster.world_size(state.seats)
    if complete and state.progress.finished and all(e.code == 0 for e in state.exits):
        return _succeed(state, now)
    if suspect is not None and not blame.left_as_asked(suspect):
        text = f"rank {suspect.rank} failed while leaving: {blame.describe(suspect)}"
        state = told(state, now, "rank_failed", text, step=suspect.step, rank=suspect.rank)
    if cause is Cause.DEADLINE:
        return _end(state, ExitCode.MAX_DURATION, words.time_is_up(state), now)
    return _gather(state, now)


def _fail(state: State, suspect: RankExited, now: float) -> Change:
    """A failure of the script: another generation as long as the budget lasts."""
    error = blame.describe(suspect)
    state = told(
        state,
        now,
        "rank_failed",
        f"rank {suspect.rank} failed: {error}",
        step=suspect.step,
        rank=suspect.rank,
        worker=roster.worker_of(state.seats, suspect.rank),
    )
    failures = (*state.failures, blame.signature(suspect))[-SAME_FAILURE_LIMIT:]
    state = replace(state, failures=failures, errors_used=state.errors_used + 1)
    code, why = blame.outcome(suspect), blame.reason(suspect)
    if suspect.unstartable:
        return _end(state, ExitCode.SETUP_FAILED, error, now)
    if state.errors_used > state.rules.error_budget:
        used = words.used_up(state.rules.error_budget)
        return _end(state, code, f"rank {suspect.rank} failed: {why}{used}", now)
    if len(failures) == SAME_FAILURE_LIMIT and len(set(failures)) == 1:
        text = f"{SAME_FAILURE_LIMIT} times the same failure at step {suspect.step}: {why}"
        return _end(told(state, now, "same_failure", text), code, text, now)
    return _gather(replace(state, restarts=state.restarts + 1), now)


def _hung(state: State, now: float) -> Change:
    assert state.stall is not None
    rank, text = progress.describe_stall(state.stall, blame.stuck(state.exits, state.stall.rank))
    if rank is None and (odd := blame.apart(state.exits)) is not None:
        rank, text = odd[0].rank, progress.describe_parting(state.stall, *odd)
    worker = None if rank is None else roster.worker_of(state.seats, rank)
    state = told(state, now, "hang", text, step=state.stall.step, rank=rank, worker=worker)
    state = replace(state, hangs_used=state.hangs_used + 1)
    if state.hangs_used > state.rules.hang_budget:
        return _end(state, ExitCode.HANG, text + words.used_up(state.rules.hang_budget), now)
    return _gather(replace(state, restarts=state.restarts + 1), now)


def _first_to_leave(state: State) -> RankExited:
    left = next(exited for exited in state.exits if exited.code != ExitCode.SUCCEEDED)
    return replace(left, error="left with a checkpoint that nobody asked for")


def _gather(state: State, now: float) -> Change:
    leaving = any(peer.leaving for peer in state.peers.values())
    here, needed = len(roster.staying(state.peers)), state.rules.min_workers
    if here < needed and not leaving:
        text = f"waiting: {here} of at least {words.count(needed, 'worker')} are here"
        state = told(state, now, "waiting_for_workers", text)
    return replace(state, phase=Phase.GATHERING, since=now, settle=leaving), ()


def _end(state: State, code: int, reason: str, now: float) -> Change:
    text = reason if code in _WELL else f"{reason}{words.lost_text(state)}"
    state = told(state, now, "gang_ended", text, step=state.progress.step)
    state = replace(state, phase=Phase.ENDED, since=now, outcome=int(code), detail=reason)
    return state, (End(int(code), reason),)
