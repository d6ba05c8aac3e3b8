"""What a worker's agent and the leader of its gang tell each other: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import ClassVar, TypeAlias

from dtp_trainer.flat import FlatRecord
from dtp_trainer.inspection import Ask
from dtp_trainer.wire import Host, Window


class Malformed(Exception):
    """A line that is no message of ours."""


# --------------------------------------------------------------------------- a member to its leader


@dataclasses.dataclass(frozen=True, slots=True)
class Hello(FlatRecord):
    """The first message of a member."""

    worker: int
    host: str
    nproc: int
    wished: int
    """How many workers the operator wished when this one was launched."""
    leaving: bool = False
    unfit: str = ""
    """Why this worker can start no ranks: its setup failed. Empty: it can."""
    generation: int = 0
    """The last in which it took part."""
    reached: int = 0
    """The newest step that its ranks completed in that; 0: none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Leaving(FlatRecord):
    """The worker was asked to stop."""


@dataclasses.dataclass(frozen=True, slots=True)
class Port(FlatRecord):
    """A port that is free on the member's host, kept free for this preparation."""

    ticket: int
    port: int


@dataclasses.dataclass(frozen=True, slots=True)
class RankExited(FlatRecord):
    """A rank is gone; of how it came to that, what its agent knows."""

    generation: int
    rank: int
    code: int
    """Negative: the signal that ended it."""
    step: int = 0
    """The last one it completed in this generation."""
    killed: bool = False
    """Its own agent killed it, so the code says nothing."""
    late: bool = False
    """Killed because it did not leave in time after SIGTERM."""
    error: str = ""
    """The last line of its traceback, or of what it wrote to stderr."""
    formed_group: bool = False
    """It joined a process group."""
    stands_in: str = ""
    """Where it stood when a signal ended it, if it could tell: ``load (train.py:12)``."""
    waits: bool = False
    """It stood in a call that waits for other ranks."""
    unstartable: bool = False
    """There was no process: the command could not be started."""


@dataclasses.dataclass(frozen=True, slots=True)
class RanksGone(FlatRecord):
    """No process of this generation is left on the worker; follows the last `RankExited`."""

    generation: int


@dataclasses.dataclass(frozen=True, slots=True)
class Effort(FlatRecord):
    """What the steps of a rank took in this generation."""

    began: int
    """The step before its first one: that of the checkpoint it came from."""
    reached: int
    """Its last one."""
    seconds: float
    """Of all of them together, by their own times."""


@dataclasses.dataclass(frozen=True, slots=True)
class Beat(FlatRecord):
    """Once a second, and at once with the first step of a generation and with rank 0's windows."""

    nested: ClassVar[Mapping[str, type[FlatRecord]]] = {
        "window": Window,
        "host": Host,
        "effort": Effort,
    }

    generation: int = 0
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rank → the last step it completed in this generation; 0 for one that has yet to."""
    reporting: bool = False
    """The ranks opened their step files, so a missing step means something."""
    window: Window | None = None
    phases: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Rank → phase → mean seconds a step in `window`."""
    host: Host | None = None
    formed_group: bool = False
    effort: Effort | None = None
    """Of rank 0, from its worker alone."""


# --------------------------------------------------------------------------- the leader to a member


@dataclasses.dataclass(frozen=True, slots=True)
class AskPort(FlatRecord):
    ticket: int


@dataclasses.dataclass(frozen=True, slots=True)
class Start(FlatRecord):
    """Start your ranks of this generation."""

    generation: int
    world_size: int
    first_rank: int
    group_rank: int
    group_world_size: int
    master_addr: str
    master_port: int
    restart_count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Drain(FlatRecord):
    """SIGTERM to the ranks: checkpoint at the next step boundary and leave."""

    generation: int


@dataclasses.dataclass(frozen=True, slots=True)
class Kill(FlatRecord):
    """SIGKILL to the ranks and all that they started."""

    generation: int
    dump: bool = False
    """Let each rank say first where it stands: `RankExited.stands_in`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Profile(FlatRecord):
    """Record what your ranks do in their next steps."""

    nested: ClassVar[Mapping[str, type[FlatRecord]]] = {"ask": Ask}

    generation: int
    ask: Ask


@dataclasses.dataclass(frozen=True, slots=True)
class Dismiss(FlatRecord):
    """The worker's part is over: exit with this code."""

    code: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Pulse(FlatRecord):
    """The leader lives; once a second."""


FromMember: TypeAlias = Hello | Leaving | Port | RankExited | RanksGone | Beat
FromLeader: TypeAlias = AskPort | Start | Drain | Kill | Profile | Dismiss | Pulse
Message: TypeAlias = FromMember | FromLeader

_KINDS: Mapping[str, type[FlatRecord]] = {
    kind.__name__: kind
    for kind in (
        *(Hello, Leaving, Port, RankExited, RanksGone, Beat),
        *(AskPort, Start, Drain, Kill, Profile, Dismiss, Pulse),
    )
}


def encode(message: Message) -> bytes:
    """One line, with its newline."""
    data = {"kind": type(message).__name__, **message.to_dict()}
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """
    Raises:
        Malformed: `line` is no message.
    """
    try:
        data = json.loads(line)
        message: Message = _KINDS[data["kind"]].from_dict(data)
    except (ValueError, KeyError, TypeError) as error:
        raise Malformed(f"not a message of a gang: {line[:80]!r}") from error
    return message
