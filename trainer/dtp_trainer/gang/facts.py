"""What an input changes in the leader's knowledge, before any rule is applied. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from dtp_trainer.checkpoints.grace import span, too_short
from dtp_trainer.gang import effort, progress, roster
from dtp_trainer.gang.messages import Beat, Hello, Leaving, Port, RankExited, RanksGone
from dtp_trainer.gang.roster import Peer
from dtp_trainer.gang.state import (
    Committed,
    FromMember,
    Input,
    Lost,
    Noted,
    Phase,
    Prepared,
    Said,
    State,
    Tick,
    Unprepared,
)
from dtp_trainer.wire import CheckpointEntry

RETRY_S = 1.0
TOO_SHORT = "grace_too_short"


def absorb(state: State, given: Input, now: float) -> State:
    over = state.phase in (Phase.ENDED, Phase.RESIGNED)
    if over and not isinstance(given, Committed):
        return state  # Those that were dismissed leave; nobody is lost.
    match given:
        case Said(worker, message):
            return _hear(state, worker, message, now)
        case Lost(worker):
            return lose(state, worker, now)
        case Prepared(ticket) if _current(state, ticket):
            return replace(state, prepared=given)
        case Unprepared(ticket, why) if _current(state, ticket):
            if why != state.trouble:
                state = told(state, now, "not_formed", f"no generation could be formed: {why}")
            return replace(state, phase=Phase.GATHERING, not_before=now + RETRY_S, trouble=why)
        case Committed(entry):
            return _committed(state, entry)
        case Noted(name, text):
            return told(state, now, name, text, step=state.progress.step)
        case Prepared() | Unprepared() | Tick():
            return state
        case _:
            assert_never(given)


def _committed(state: State, entry: CheckpointEntry) -> State:
    """That a stop leaves too little time for such a checkpoint is said once."""
    state = replace(state, chronicle=state.chronicle.committed(entry))
    problem = too_short(entry, state.rules.grace_s)
    if problem is None or any(e.name == TOO_SHORT for e in state.chronicle.events):
        return state
    return told(state, entry.at, TOO_SHORT, problem, step=entry.step)


def told(
    state: State,
    at: float,
    name: str,
    text: str,
    *,
    step: int | None = None,
    worker: int | None = None,
    rank: int | None = None,
) -> State:
    """An event is added to the gang's chronicle."""
    chronicle = state.chronicle.tell(at, name, text, step=step, worker=worker, rank=rank)
    return replace(state, chronicle=chronicle)


def grace_over(state: State, now: float) -> State:
    """Ranks are killed because they did not leave in time; told once a generation."""
    if state.chronicle.tells_of("grace_over"):
        return state
    text = f"ranks were killed: they did not leave within the grace of {span(state.rules.grace_s)}"
    return told(state, now, "grace_over", text)


def lose(state: State, worker: int, now: float) -> State:
    """A worker's connection ended; an expected end was preceded by its removal from the peers."""
    peer = state.peers.get(worker)
    if peer is None:
        return state
    state = removed(state, worker)
    running = worker in state.busy
    if running:
        state = replace(state, busy=state.busy - {worker}, lost=(*state.lost, worker))
    if running or not peer.leaving:
        text = f"worker {worker} on {peer.host} was lost"
        state = told(state, now, "worker_lost", text, worker=worker)
    return state


def removed(state: State, worker: int) -> State:
    peers = {key: value for key, value in state.peers.items() if key != worker}
    return replace(
        state,
        peers=peers,
        known=state.known - {worker},
        progress=progress.forget_worker(state.progress, worker),
    )


def _current(state: State, ticket: int) -> bool:
    return state.phase is Phase.PREPARING and state.ticket == ticket


def _hear(state: State, worker: int, message: FromMember, now: float) -> State:
    match message:
        case Hello():
            return _join(state, message, now)
        case Leaving():
            return _leave(state, worker, now)
        case RankExited():
            return _count_exit(state, worker, message, now)
        case RanksGone(generation):
            current = generation == state.generation
            return replace(state, busy=state.busy - {worker}) if current else state
        case Beat():
            heard = progress.heard(
                state.progress, worker, message, generation=state.generation, now=now
            )
            return _trained(replace(state, progress=heard), message, now)
        case Port():
            return state
        case _:
            assert_never(message)


def _trained(state: State, beat: Beat, now: float) -> State:
    """With the first step of a generation: where it goes on, and what has to be done again."""
    ledger = state.effort
    if beat.effort is None or beat.generation != state.generation:
        return state
    if effort.begins(ledger, beat.effort):
        ledger, loss = effort.went_back(ledger, beat.effort)
        if loss is not None:
            state = told(state, now, "resumed", effort.describe(loss), step=loss.back_to)
    return replace(state, effort=effort.advanced(ledger, beat.effort))


def _count_exit(state: State, worker: int, exited: RankExited, now: float) -> State:
    if exited.generation != state.generation or worker not in state.busy:
        return state
    if exited.late:
        state = grace_over(state, now)
    return replace(
        state,
        exits=(*state.exits, exited),
        progress=progress.exited(state.progress, exited),
    )


def _join(state: State, hello: Hello, now: float) -> State:
    worker = hello.worker
    peer = Peer(worker, hello.host, hello.nproc, now, hello.leaving, hello.unfit)
    if worker not in state.known:
        state = told(
            state, now, "worker_joined", f"worker {worker} joined from {hello.host}", worker=worker
        )
    newest = worker >= max(state.peers, default=worker)
    ledger = state.effort
    if hello.reached and hello.generation == state.generation and ledger.begun is None:
        # A leader just elected: what its predecessor published last is up to a second old.
        ledger = replace(ledger, reached=max(hello.reached, ledger.reached or 0))
    return replace(
        state,
        effort=ledger,
        peers={**state.peers, worker: peer},
        known=state.known | {worker},
        wished=hello.wished if newest else state.wished,
    )


def _leave(state: State, worker: int, now: float) -> State:
    peer = state.peers.get(worker)
    if peer is None or peer.leaving:
        return state
    peers = {**state.peers, worker: replace(peer, leaving=True)}
    state = told(state, now, "worker_leaving", f"worker {worker} was asked to stop", worker=worker)
    remaining = max(1, len(roster.staying(peers)))
    return replace(state, peers=peers, wished=min(state.wished, remaining))
