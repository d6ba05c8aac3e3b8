"""``gang.json`` and the leader's state: what a new leader inherits, and what it tells. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dtp_trainer.gang import effort, roster
from dtp_trainer.gang.attribution import verdict
from dtp_trainer.gang.chronicle import continued
from dtp_trainer.gang.facts import told
from dtp_trainer.gang.progress import Progress
from dtp_trainer.gang.state import Phase, Rules, State
from dtp_trainer.wire import Gang, GangPhase, Launch, Member
from dtp_trainer.worker.folding import measured

FORGIVEN_S = 300.0
"""A leader that leads for so long without a mistake of ours begins to count them anew."""


def rules_of(launch: Launch) -> Rules:
    return Rules(
        min_workers=launch.min_workers,
        max_workers=launch.max_workers,
        error_budget=launch.error_budget,
        hang_budget=launch.hang_budget,
        start_within_s=launch.start_within_s,
        grace_s=launch.grace_s,
        no_step_for_s=launch.no_step_for_s,
        train_until=launch.train_until,
    )


def inherit(previous: Gang | None, launch: Launch, now: float) -> State:
    """The state of a leader that takes office after `previous`.

    Numbers of events and generations go on over all attempts; budgets, within this one.
    """
    state = State(
        rules=rules_of(launch),
        me=launch.worker,
        since=now,
        elected_at=now,
        chronicle=continued(previous),
        wished=launch.workers,
        generation=previous.generation if previous else 0,
        effort=_effort_of(previous),
        progress=Progress(shown=previous, trend=previous.trend if previous else ()),
    )
    if previous is not None and previous.attempt == launch.attempt:
        state = _go_on(state, previous, now)
    text = f"worker {state.me} leads attempt {launch.attempt}"
    return told(state, now, "leader_elected", text, worker=state.me)


def _go_on(state: State, previous: Gang, now: float) -> State:
    formed = previous.world_size > 0
    leaving = {member.worker for member in previous.members if member.leaving}
    others = {member.worker for member in previous.members} - leaving
    if not previous.leader_error:
        others -= {previous.leader}
    state = replace(
        state,
        formed=formed,
        expected=frozenset(others | {state.me}) if formed else frozenset(),
        known=frozenset(others | {state.me}),
        restarts=previous.restarts,
        errors_used=previous.errors_used,
        hangs_used=previous.hangs_used,
        leader_errors=previous.leader_errors,
    )
    if (name := _why_replaced(previous, leaving, state.me)) is None:
        return state
    text = f"worker {previous.leader}, the leader, was lost"
    if name == "leader_failed":
        text = f"worker {previous.leader}, the leader, failed: {previous.leader_error}"
    state = told(state, now, name, text, worker=previous.leader)
    broken = previous.phase in (GangPhase.RUNNING, GangPhase.DRAINING)
    return replace(state, restarts=state.restarts + (1 if broken else 0))


def _why_replaced(previous: Gang, leaving: set[int], me: int) -> str | None:
    """The event that tells of it; None when the last leader left as asked, or came back."""
    if previous.leader_error:
        return "leader_failed"
    return None if previous.leader in leaving or previous.leader == me else "worker_lost"


def _effort_of(previous: Gang | None) -> effort.Ledger:
    if previous is None:
        return effort.Ledger()
    kept = continued(previous).checkpoint[1]
    return effort.inherited(previous.step, kept, previous.unsaved_s)


def report(state: State, *, attempt: int, term: int, address: str, now: float) -> Gang:
    """What the leader writes to ``gang.json``; `now` is wall time."""
    running = state.phase in (Phase.RUNNING, Phase.DRAINING)
    window = state.progress.window
    shown = window or state.progress.shown
    return Gang(
        attempt=attempt,
        term=term,
        leader=state.me,
        address=address,
        phase=state.phase.shown,
        generation=state.generation,
        updated=now,
        members=_members(state),
        world_size=roster.world_size(state.seats) if state.formed else 0,
        step=state.progress.step,
        total_steps=state.progress.total_steps,
        epoch=shown.epoch if shown else None,
        last_step_at=window.at if window else _last_step_at(state),
        values=shown.values if shown else {},
        samples_per_s=window.samples_per_s if window and running else None,
        tokens_per_s=window.tokens_per_s if window and running else None,
        trend=state.progress.trend,
        data_wait=_data_wait(state),
        **_attribution(state.progress),
        restarts=state.restarts,
        errors_used=state.errors_used,
        hangs_used=state.hangs_used,
        unsaved_s=_unsaved_s(state),
        leader_errors=state.leader_errors if now < state.elected_at + FORGIVEN_S else 0,
        outcome=state.outcome,
        detail=state.detail,
        events=state.chronicle.events,
    )


def _members(state: State) -> tuple[Member, ...]:
    first_ranks = {seat.worker: seat.first_rank for seat in state.seats if state.busy}
    return tuple(_member(state, worker, first_ranks.get(worker)) for worker in sorted(state.peers))


def _member(state: State, worker: int, first_rank: int | None) -> Member:
    peer, host = state.peers[worker], state.progress.hosts.get(worker)
    return Member(
        worker=worker,
        host=peer.host,
        nproc_per_node=peer.nproc,
        first_rank=first_rank,
        leaving=peer.leaving,
        cpu_percent=host.cpu_percent if host else None,
        memory_bytes=host.memory_bytes if host else None,
        gpu_percent=host.gpu_percent if host else (),
        gpu_memory_bytes=host.gpu_memory_bytes if host else (),
    )


def _unsaved_s(state: State) -> float | None:
    reached = state.effort.reached
    if reached is None:
        return None
    seconds = state.effort.between(state.chronicle.checkpoint[1], reached)
    return None if seconds is None else round(seconds, 3)


def _last_step_at(state: State) -> float | None:
    return state.progress.shown.last_step_at if state.progress.shown else None


def _attribution(progress: Progress) -> dict[str, Any]:
    """Of this generation; until its first numbers, what was told of the one before."""
    known, shown = progress.attribution, progress.shown
    if known.step_s is None:
        names = ("step_s", "phases", "verdict", "verdict_why")
        return {name: getattr(shown, name) for name in names} if shown else {}
    found = verdict(known)
    return {
        "step_s": measured(known.step_s),
        "phases": {name: round(share, 4) for name, share in known.shares.items()},
        "verdict": found.word,
        "verdict_why": found.why,
    }


def _data_wait(state: State) -> float | None:
    """Share of a step spent waiting for data, by the medians over the ranks."""
    phases = state.progress.window.phases if state.progress.window else {}
    step, data = phases.get("step", {}).get("median"), phases.get("data", {}).get("median")
    return None if not step or data is None else min(1.0, data / step)
