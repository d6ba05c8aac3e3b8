"""One decision in the making: what was seen goes in; what is recorded, then done, comes out. Pure.

The rules between the two ends are in `lifecycle`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeAlias, assert_never

from dtp_engine.backend import Gang, Liveness, WorkerSight
from dtp_engine.endings import exit_words
from dtp_engine.jobs import Attempt, Event, Job, JobState, Placement, PlacementState, Reason
from dtp_engine.room import Room
from dtp_trainer import wire

STOP_MARGIN = timedelta(seconds=5)
"""A worker ends its own grace; only one that is late by so much is killed from outside."""
UNSEEN = "not seen since"
"""How the detail of a job begins while its workers cannot be observed."""


@dataclass(frozen=True, slots=True)
class Provision:
    """Ask for capacity for so many more workers."""

    workers: int


@dataclass(frozen=True, slots=True)
class Launch:
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    workers: tuple[int, ...]
    grace: timedelta


Action: TypeAlias = Provision | Launch | Stop


@dataclass(frozen=True, slots=True)
class Sight:
    """What is known at one moment, beside what the ledger holds."""

    now: datetime
    room: Room
    gang: Gang | None = None
    """None when the backend did not answer, or when there is no attempt to look at."""
    trouble: str = ""
    """What the backend said instead of an answer, in one line."""
    secret: str = ""
    """Fresh; becomes that of the attempt, if this decision begins one."""


@dataclass(frozen=True, slots=True)
class Decision:
    job: Job
    attempt: Attempt | None
    """The newest one; another than before when this decision began it."""
    actions: tuple[Action, ...]
    """To be done after the rest is recorded; doing one twice is doing it once."""
    events: tuple[Event, ...]


class Turn:
    """The job and its attempt as they will be recorded, and what is told about it."""

    def __init__(self, job: Job, attempt: Attempt | None, sight: Sight) -> None:
        self.job = job
        self.attempt = attempt
        self.sight = sight
        self.events: list[Event] = []
        self.gone_now: list[WorkerSight] = []
        self.provision = 0

    @property
    def now(self) -> datetime:
        return self.sight.now

    @property
    def status(self) -> wire.Gang | None:
        return self.sight.gang.status if self.sight.gang else None

    @property
    def placements(self) -> tuple[Placement, ...]:
        return self.attempt.placements if self.attempt else ()

    @property
    def present(self) -> tuple[Placement, ...]:
        return self.attempt.present if self.attempt else ()

    @property
    def staying(self) -> tuple[Placement, ...]:
        return self.attempt.staying if self.attempt else ()

    @property
    def lost(self) -> list[Placement]:
        """Workers that went unasked."""
        return [p for p in self.placements if p.ended_at is not None and p.stop_at is None]

    @property
    def overdue(self) -> list[Placement]:
        """Workers that were asked to leave and are still there, though their grace is over."""
        late = self.now - self.job.spec.stop_grace - STOP_MARGIN
        return [p for p in self.present if p.stop_at is not None and p.stop_at < late]

    @property
    def is_blind(self) -> bool:
        """Something that should be there cannot be observed."""
        if self.sight.gang is None:
            return bool(self.present)
        seen = self.sight.gang.workers
        present = [seen[p.worker] for p in self.present if p.worker in seen]
        return any(worker.liveness is Liveness.UNKNOWN for worker in present)

    def tell(self, name: str, text: str) -> None:
        self._append(self.now, "controller", name, text)

    def pass_on(self, event: wire.GangEvent) -> None:
        self._append(datetime.fromtimestamp(event.at, UTC), "gang", event.name, event.text)

    def become(self, state: JobState, reason: Reason | None = None, detail: str = "") -> None:
        before = self.job.state
        self.job = replace(self.job, state=state, reason=reason, detail=detail)
        if state.final:
            self.job = replace(self.job, ended_at=self.now)
        if state is not before:
            self.tell("state", f"{before} → {state}" + (f": {detail}" if detail else ""))

    def explain(self, reason: Reason | None, detail: str) -> None:
        self.become(self.job.state, reason, detail)

    def plan(self, workers: int) -> list[int]:
        """Add placements with numbers never used before in the attempt; returns the numbers."""
        assert self.attempt is not None
        first = max((p.worker for p in self.placements), default=-1) + 1
        numbers = list(range(first, first + workers))
        planned = (Placement(number, PlacementState.PLANNED, self.now) for number in numbers)
        self.attempt = replace(self.attempt, placements=(*self.placements, *planned))
        return numbers

    def ask_to_leave(self, workers: Collection[int]) -> None:
        """Also one that may never have been launched: stopping it makes a late launch harmless."""

        def asked(placement: Placement) -> Placement:
            if placement.worker not in workers or placement.stop_at is not None:
                return placement
            return replace(placement, state=PlacementState.STOPPING, stop_at=self.now)

        self._change(asked)

    def take_over_sightings(self) -> None:
        if self.sight.gang is not None:
            seen = self.sight.gang.workers
            self._change(lambda p: self._seen(p, seen.get(p.worker)))
        if self.job.detail.startswith(UNSEEN) and not self.is_blind:
            self.explain(self.job.reason, "")
            self.tell("seen_again", "the workers can be observed again")

    def take_over_gang_events(self) -> None:
        """Each once, by number: the last one taken over is recorded with them."""
        seen = self.job.gang_events_seen
        fresh = [e for e in self.status.events if e.seq > seen] if self.status else []
        if not fresh:
            return
        if missed := fresh[0].seq - seen - 1:
            self.tell("events_missed", f"{missed} events of the gang came while nobody looked")
        for event in fresh:
            self.pass_on(event)
        self.job = replace(self.job, gang_events_seen=fresh[-1].seq)

    def decision(self) -> Decision:
        """The actions follow from what is recorded, and from nothing else."""
        return Decision(self.job, self.attempt, tuple(self._actions()), tuple(self.events))

    def _actions(self) -> Iterable[Action]:
        if self.provision:
            yield Provision(self.provision)
        planned = [p.worker for p in self.present if p.state is PlacementState.PLANNED]
        if planned:
            yield Launch(tuple(planned))
        leaving = [p for p in self.present if p.state is PlacementState.STOPPING]
        at_once = leaving if self.job.kill else self.overdue
        if polite := tuple(p.worker for p in leaving if p not in at_once):
            yield Stop(polite, self.job.spec.stop_grace)
        if at_once:
            yield Stop(tuple(p.worker for p in at_once), timedelta())

    def _seen(self, placement: Placement, sight: WorkerSight | None) -> Placement:
        if placement.state is PlacementState.GONE or sight is None:
            return placement
        match sight.liveness:
            case Liveness.UNKNOWN:
                return placement
            case Liveness.ALIVE:
                planned = placement.state is PlacementState.PLANNED
                return replace(placement, state=PlacementState.LAUNCHED) if planned else placement
            case Liveness.EXITED:
                return self._gone(placement, sight)
            case _:
                assert_never(sight.liveness)

    def _gone(self, placement: Placement, sight: WorkerSight) -> Placement:
        self.gone_now.append(sight)
        words = f"is gone: {sight.detail}" if sight.detail else exit_words(sight.exit_code)
        if sight.reason is Reason.SPOT_INTERRUPTION:
            self.job = replace(self.job, preemptions=self.job.preemptions + 1)
            words += "; its spot machine was taken back"
        self.tell("worker_gone", f"worker {placement.worker} {words}")
        gone = replace(placement, state=PlacementState.GONE, ended_at=self.now)
        return replace(gone, exit_code=sight.exit_code)

    def _change(self, change: Callable[[Placement], Placement]) -> None:
        if self.attempt is not None:
            placements = tuple(change(placement) for placement in self.placements)
            self.attempt = replace(self.attempt, placements=placements)

    def _append(self, at: datetime, actor: str, name: str, text: str) -> None:
        attempt = self.attempt.number if self.attempt else 0
        self.events.append(Event(0, at, self.job.id, attempt, actor, name, text))
