"""What the leader of a gang knows, hears and does: the values of its state machine (`rules.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, assert_never

from dtp_trainer.gang.chronicle import Chronicle
from dtp_trainer.gang.effort import Ledger
from dtp_trainer.gang.messages import Beat, Hello, Leaving, Port, RankExited, RanksGone
from dtp_trainer.gang.progress import Progress, Stall
from dtp_trainer.gang.roster import Peer, Seat
from dtp_trainer.wire import CheckpointEntry, GangPhase


class Phase(StrEnum):
    GATHERING = "gathering"
    """No ranks run; wait until enough workers are there."""
    PREPARING = "preparing"
    """The fence is raised and a fresh port is asked for."""
    RUNNING = "running"
    DRAINING = "draining"
    """The ranks were asked to checkpoint and leave."""
    CLEARING = "clearing"
    """The ranks were killed; wait until none is left anywhere."""
    ENDED = "ended"
    """The outcome is known; every worker exits with it."""
    RESIGNED = "resigned"
    """This leader leaves, others stay; one of them takes over."""

    @property
    def shown(self) -> GangPhase:
        """What readers of ``gang.json`` see."""
        match self:
            case Phase.RUNNING:
                return GangPhase.RUNNING
            case Phase.DRAINING | Phase.RESIGNED:
                return GangPhase.DRAINING
            case Phase.ENDED:
                return GangPhase.ENDED
            case Phase.GATHERING | Phase.PREPARING | Phase.CLEARING:
                return GangPhase.FORMING
            case _:
                assert_never(self)


class Cause(StrEnum):
    """Why a generation ends."""

    LEAVING = "leaving"
    JOINING = "joining"
    DEADLINE = "deadline"
    LEFT = "left"
    """A rank paused itself: somebody sent it SIGTERM."""
    FAILED = "failed"
    LOST = "lost"
    HANG = "hang"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator allows; from the leader's launch file."""

    min_workers: int
    max_workers: int
    error_budget: int
    hang_budget: int
    start_within_s: float
    grace_s: float
    no_step_for_s: float | None = None
    train_until: float | None = None


# ------------------------------------------------------------------------------------------- inputs

FromMember: TypeAlias = Hello | Leaving | Port | RankExited | RanksGone | Beat


@dataclass(frozen=True, slots=True)
class Said:
    worker: int
    message: FromMember


@dataclass(frozen=True, slots=True)
class Lost:
    """A member's connection ended."""

    worker: int


@dataclass(frozen=True, slots=True)
class Prepared:
    ticket: int
    generation: int
    master_port: int


@dataclass(frozen=True, slots=True)
class Unprepared:
    ticket: int
    why: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint was found in the head."""

    entry: CheckpointEntry


@dataclass(frozen=True, slots=True)
class Noted:
    """Something to be told that changes nothing."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Input: TypeAlias = Said | Lost | Prepared | Unprepared | Committed | Noted | Tick


# ------------------------------------------------------------------------------------------ outputs


@dataclass(frozen=True, slots=True)
class Prepare:
    """Raise the fence and ask this worker for a port; answer with `Prepared` or `Unprepared`."""

    ticket: int
    worker: int
    at_least: int
    """The generation must be at least this."""


@dataclass(frozen=True, slots=True)
class StartSeat:
    seat: Seat
    generation: int
    world_size: int
    group_world_size: int
    master_addr: str
    master_port: int
    restart_count: int


@dataclass(frozen=True, slots=True)
class DrainRanks:
    worker: int
    generation: int


@dataclass(frozen=True, slots=True)
class KillRanks:
    worker: int
    generation: int
    dump: bool = False


@dataclass(frozen=True, slots=True)
class DismissWorker:
    worker: int
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the connection of a worker that does not do what it is told."""

    worker: int


@dataclass(frozen=True, slots=True)
class End:
    """Publish the outcome, then dismiss every worker with it."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Resign:
    """Publish, dismiss the own worker as PAUSED, close; the others elect the next leader."""

    reason: str


Output: TypeAlias = (
    Prepare | StartSeat | DrainRanks | KillRanks | DismissWorker | Drop | End | Resign
)
Outputs: TypeAlias = tuple[Output, ...]


# -------------------------------------------------------------------------------------------- state


@dataclass(frozen=True, slots=True)
class State:
    """All that the leader knows. Times are Unix seconds of its own steady clock."""

    rules: Rules
    me: int
    """The leader's own worker number."""
    since: float
    """When the phase began; PREPARING goes on with the time of GATHERING."""
    chronicle: Chronicle = field(default_factory=Chronicle)
    phase: Phase = Phase.GATHERING
    wished: int = 1
    peers: Mapping[int, Peer] = field(default_factory=dict)
    expected: frozenset[int] = frozenset()
    """Workers of the last generation that this leader, new in office, waits for."""
    known: frozenset[int] = frozenset()
    """Workers whose arrival was told."""
    formed: bool = False
    """A generation of this attempt has run."""
    generation: int = 0
    ticket: int = 0
    """Names the newest preparation; answers to older ones are ignored."""
    prepared: Prepared | None = None
    not_before: float = 0.0
    """When a failed preparation may be tried again."""
    trouble: str = ""
    """Why the newest preparation failed."""
    settle: bool = False
    """A worker left just now; see `gang.SETTLE_S`."""

    seats: tuple[Seat, ...] = ()
    busy: frozenset[int] = frozenset()
    """Workers on which ranks of the generation may still run."""
    exits: tuple[RankExited, ...] = ()
    """In the order in which they were heard of."""
    lost: tuple[int, ...] = ()
    """Workers that the generation lost."""
    cause: Cause | None = None
    """Why the generation ends; None while it runs."""
    stall: Stall | None = None
    """What was known of a hang when its ranks were killed."""

    progress: Progress = field(default_factory=Progress)
    effort: Ledger = field(default_factory=Ledger)
    restarts: int = 0
    errors_used: int = 0
    hangs_used: int = 0
    failures: tuple[str, ...] = ()
    """Signatures of the newest failures, newest last."""
    leader_errors: int = 0
    """Leaders before this one that failed in a row, by mistakes of ours."""
    elected_at: float = 0.0
    outcome: int | None = None
    detail: str = ""
