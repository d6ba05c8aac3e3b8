"""Checkpoints: copied at the step boundary, written and hashed by a thread, real once committed.

Signatures first; the bodies follow. `dtp_trainer.heads` has the fence (`Fenced`, `Retention`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dtp_trainer.heads import Retention
from dtp_trainer.storage import Storage
from dtp_trainer.wire import CheckpointEntry


@dataclass(frozen=True, slots=True)
class StateBundle:
    """What a checkpoint holds, as nested dicts, lists, tuples, tensors, numpy arrays and scalars.

    Taken by reference: `Checkpointer.save` copies the tensors before it returns.
    """

    shared: Mapping[str, Any]
    """The same on all ranks (model, optimizer, scheduler …); each rank writes its share."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Of this rank alone (states of random number generators …)."""


class Outcome(StrEnum):
    COMMITTED = "committed"
    """Rank 0: the checkpoint exists."""
    WRITTEN = "written"
    """Other ranks: this rank's share is durable; whether it becomes real is rank 0's report."""
    FAILED = "failed"
    """Nothing was committed, the checkpoint before is intact, training may go on."""
    FENCED = "fenced"
    """A newer generation owns the job; `save`, `wait` and `close` raise `Fenced` from now on."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    name: str
    step: int
    outcome: Outcome
    error: str | None
    """One line for people, with outcome FAILED or FENCED."""
    bytes: int
    """Of the whole checkpoint on rank 0, of this rank's share elsewhere."""
    blocked_s: float
    """How long `save` kept the training loop, waiting for the save before included."""
    durable_s: float
    """From the call of `save` to the commit (rank 0) or to this rank's share on disk."""
    entry: CheckpointEntry | None = None


class Checkpointer:
    """Saves of one rank in one generation. All ranks call `save` at the same steps.

    At most one save is in flight; `save` waits for the one before, which `busy` foretells.
    `on_report` is called on the writing thread, once a save.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        generation: int,
        attempt: int,
        rank: int,
        world_size: int,
        policy: Retention,
        job: str = "",
        on_report: Callable[[SaveReport], None] | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """A save is still being written (differs among ranks: agree before acting on it)."""
        raise NotImplementedError

    @property
    def last_committed(self) -> CheckpointEntry | None:
        """Rank 0: the newest checkpoint that this object committed."""
        raise NotImplementedError

    def prepare(self, state: StateBundle) -> None:
        """Allocate the buffers now (after the first step), so that the first save blocks no longer
        than the others. Optional."""
        raise NotImplementedError

    def save(
        self,
        state: StateBundle,
        *,
        step: int,
        epoch: float,
        values: Mapping[str, float],
        data_state: Mapping[str, Any],
        blocking: bool = False,
    ) -> SaveReport | None:
        """Copy the state now, write it in the background; with `blocking`, the report of it.

        Raises:
            Fenced: this or an earlier save found that a newer generation owns the job.
            UnsupportedState: `state` holds something that no checkpoint can hold; names its path.
        """
        raise NotImplementedError

    def wait(self) -> SaveReport | None:
        """Until no save is in flight; the report of the last one, None before the first.

        Raises `Fenced`.
        """
        raise NotImplementedError

    def close(self) -> SaveReport | None:
        """`wait`, then free the buffers."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """Every hash of it was verified. All tensors are on the CPU."""

    entry: CheckpointEntry
    shared: Mapping[str, Any]
    own: Mapping[str, Any] | None
    """Of the rank that asked; None when the checkpoint was made at another world size."""
    step: int
    epoch: float
    values: Mapping[str, float]
    data_state: Mapping[str, Any]


def load_newest(
    storage: Storage,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_damage: Callable[[str], None] | None = None,
) -> LoadedCheckpoint | None:
    """The resume point, or the newest one before it that is whole; None when there is none.

    Each damaged one is said by `on_damage` (one line: which file, what was expected and found, what
    is used instead; default: a warning in the log) and marked in the head, as is the one that was
    verified. In a process group let rank 0 call this and the others `load` of the name it found, so
    that all agree.
    """
    raise NotImplementedError


def load(storage: Storage, name: str, *, rank: int = 0, world_size: int = 1) -> LoadedCheckpoint:
    """The checkpoint of that name. Raises `DamagedCheckpoint` (a `StorageError`)."""
    raise NotImplementedError
