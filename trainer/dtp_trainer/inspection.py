"""What one may look at in a job: profiles that a client asks for, and the stacks of a hang.

All of it are objects in the job's storage. A client leaves a wish (`Ask`), the gang's leader finds
it, each agent passes it to its ranks, and a rank answers with `Profiled` beside what it recorded.
Standard library only, as the wire.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dtp_trainer.flat import FlatRecord

WISH_KEY = "profiles/wish.json"
"""The wish that is open; removed by the client that left it."""
STOP_AFTER = "DTP_STOP_AFTER"
"""Environment of the ranks of a smoke run: `Session` ends the job, well, after so many steps."""
STACKS = "stacks/"
"""Where the ranks of a hang stood, see `stack_key`."""
_STACK = re.compile(r"stacks/g(?P<generation>\d+)\.rank(?P<rank>\d+)\.txt")


@dataclass(frozen=True, slots=True)
class Ask(FlatRecord):
    """Record so many steps, please."""

    id: str
    by: str
    """Who asks."""
    until: float
    """Unix time at which nobody waits for it any more."""
    steps: int
    ranks: tuple[int, ...] = ()
    """Empty: all."""
    memory: bool = False
    not_before: int = 0
    """First step to record, so that all ranks record the same ones; set by the leader."""

    def wants(self, rank: int) -> bool:
        return not self.ranks or rank in self.ranks


@dataclass(frozen=True, slots=True)
class Operator(FlatRecord):
    """What one kind of operator took in all recorded steps together."""

    name: str
    calls: int
    own_ms: float
    """On the CPU, without the operators that it called."""
    total_ms: float
    gpu_ms: float = 0.0
    own_bytes: int = 0
    """Memory that it allocated and did not free; only of a memory profile."""


@dataclass(frozen=True, slots=True)
class Profiled(FlatRecord):
    """The answer of one rank."""

    nested: ClassVar[Mapping[str, type[FlatRecord]]] = {"operators": Operator}

    id: str
    rank: int
    first_step: int = 0
    last_step: int = 0
    files: tuple[str, ...] = ()
    """Keys in the job's storage."""
    operators: tuple[Operator, ...] = ()
    """The most expensive ones first."""
    error: str = ""
    """Why nothing was recorded; one line."""


def answer_key(ask_id: str, rank: int) -> str:
    return f"profiles/{ask_id}.rank{rank}.json"


def recorded_key(step: int, rank: int, what: str) -> str:
    """
    >>> recorded_key(123, 0, "trace.json.gz")
    'profiles/step-000123.rank0.trace.json.gz'
    """
    return f"profiles/step-{step:06d}.rank{rank}.{what}"


def stack_key(generation: int, rank: int, what: str = "txt") -> str:
    """
    >>> stack_key(7, 12)
    'stacks/g0007.rank00012.txt'
    """
    return f"{STACKS}g{generation:04d}.rank{rank:05d}.{what}"


def stack_of(key: str) -> tuple[int, int] | None:
    """Generation and rank of a `stack_key`; None for another key."""
    found = _STACK.fullmatch(key)
    return (int(found["generation"]), int(found["rank"])) if found else None
