"""When to checkpoint, what came of it, and whether to leave: for a rank that dtp started."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from dtp_trainer.checkpoints.checkpoint import (
    Checkpointer,
    LoadedCheckpoint,
    Outcome,
    SaveReport,
    StateBundle,
    load,
    load_newest,
)
from dtp_trainer.checkpoints.heads import Fenced, Retention
from dtp_trainer.checkpoints.pieces import Part
from dtp_trainer.checkpoints.tree import UnsupportedState
from dtp_trainer.session.agreement import Agreement, Decision, Leave
from dtp_trainer.session.distributed import World
from dtp_trainer.session.stop import SessionError, StopRequest
from dtp_trainer.session.telemetry import say
from dtp_trainer.storage import Storage, open_storage
from dtp_trainer.wire import Env, ExitCode


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A step boundary: the state by reference, and where it stands."""

    bundle: StateBundle
    step: int
    epoch: float
    values: Mapping[str, float]
    data_state: Mapping[str, Any]


class Kept(IntEnum):
    """What became of a state that had to be kept; ordered, the worst of any rank counts."""

    YES = 0
    NO = 1
    FENCED = 2


class Keeper:
    """The checkpoints of a rank and its willingness to leave, in step with the other ranks."""

    def __init__(
        self, storage: Storage, world: World, stop: StopRequest, part: Part | None = None
    ) -> None:
        """`part`: what this rank wants of the state in a checkpoint."""
        policy = json.loads(os.environ.get(Env.CHECKPOINT) or "{}")
        self._every_s: float | None = policy.get("every_s")
        self._every_steps: int | None = policy.get("every_steps")
        self._storage, self._world, self._stop, self._part = storage, world, stop, part
        self._saver = Checkpointer(
            storage,
            generation=int(os.environ.get(Env.GENERATION, "0")),
            attempt=int(os.environ.get(Env.ATTEMPT, "0")),
            rank=world.rank,
            world_size=world.size,
            policy=Retention.from_dict(policy),
            job=os.environ.get(Env.JOB_ID, ""),
            on_report=self._on_report,
        )
        self._fenced = False
        self._begin(0)

    # ------------------------------------------------------------------------------ at the start

    def newest(self) -> LoadedCheckpoint | None:
        """The same on all ranks; a collective."""
        found, size = None, self._world.size
        if self._world.rank == 0:
            found = load_newest(self._storage, world_size=size, part=self._part, on_damage=say)
        name = self._world.told_by_first(found.entry.name if found else "")
        if name and self._world.rank != 0:
            rank = self._world.rank
            found = load(self._storage, name, rank=rank, world_size=size, part=self._part)
        self._begin(found.step if found else 0)
        return found

    def go_back(self) -> LoadedCheckpoint | None:
        """`newest`, once what is being written is written; a collective."""
        if self.settle() is Kept.FENCED:
            raise SystemExit(int(ExitCode.FENCED))
        return self.newest()

    def _begin(self, step: int) -> None:
        self._saved_step, self._saved_at = step, time.monotonic()
        self._agreement = Agreement(self._world, step)

    def prepare(self, bundle: StateBundle) -> None:
        """After the first step, so that no later one has to find room for its state."""
        with _named():
            self._saver.prepare(bundle)

    # --------------------------------------------------------------------------- at a step's end

    def decide(self, step: int, *, epoch_end: bool, last: bool) -> Decision:
        """What all ranks do after `step`. At an epoch's end, where a checkpoint is due by count,
        and after the last step, which is always kept, they agree at once."""
        keep = last or (bool(self._every_steps) and step % (self._every_steps or 1) == 0)
        decide = self._agreement.decide_now if keep or epoch_end else self._agreement.decide
        return decide(step, lambda: Decision(self._leave(), keep or self._timed()))

    def leave_now(self, step: int) -> Leave:
        """Agree at once whether to leave; every rank calls it at the same place."""
        return self._agreement.decide_now(step, lambda: Decision(self._leave())).leave

    def _leave(self) -> Leave:
        if self._fenced:
            return Leave.FENCED
        return Leave.PAUSED if self._stop.wanted else Leave.NO

    def _timed(self) -> bool:
        """By the clock of rank 0 alone; a slow storage is not asked for more than it can take."""
        if self._world.rank != 0 or self._every_s is None or self._saver.busy:
            return False
        return time.monotonic() - self._saved_at >= self._every_s

    # ----------------------------------------------------------------------------------- keeping

    def save(self, snapshot: Snapshot) -> None:
        """Copy it now and write it in the background."""
        self._save(snapshot, blocking=False)

    def commit(self, step: int, snapshot: Callable[[], Snapshot]) -> Kept:
        """Until what was trained is in a committed checkpoint, on the word of all ranks."""
        self._agreement.settle()
        kept = self._agreed(self._saver.wait)
        if kept is Kept.FENCED or (kept is Kept.YES and step == self._saved_step):
            return kept
        taken = snapshot()
        return self._agreed(lambda: self._save(taken, blocking=True))

    def settle(self) -> Kept:
        """Nothing is under way any more, neither a word between the ranks nor a write."""
        self._world.wait_long()
        self._agreement.settle()
        return self._agreed(self._saver.wait)

    def last_word(self) -> None:
        """For a rank that ends by itself: what is being written of it is still written."""
        with contextlib.suppress(Fenced):
            self._saver.wait()

    def close(self) -> None:
        """Free the buffers; nothing is in flight after `commit`."""
        self._saver.close()

    def _save(self, snapshot: Snapshot, *, blocking: bool) -> SaveReport | None:
        self._saved_step, self._saved_at = snapshot.step, time.monotonic()
        with _named():
            return self._saver.save(
                snapshot.bundle,
                step=snapshot.step,
                epoch=snapshot.epoch,
                values=snapshot.values,
                data_state=snapshot.data_state,
                blocking=blocking,
            )

    def _agreed(self, keep: Callable[[], SaveReport | None]) -> Kept:
        """The worst that any rank has to say of it; a collective."""
        try:
            report = keep()
        except Fenced:
            kept = Kept.FENCED
        else:
            kept = Kept.NO if report and report.outcome is Outcome.FAILED else Kept.YES
        return Kept(self._world.maximum([kept])[0])

    def _on_report(self, report: SaveReport) -> None:
        """On the writing thread."""
        if report.outcome is Outcome.FENCED:
            self._fenced = True
            say(f"this rank leaves: {report.error}")


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """State that no checkpoint can hold ends the script with one line."""
    try:
        yield
    except UnsupportedState as error:
        raise SessionError(str(error)) from None


def open_keeper(world: World, stop: StopRequest, part: Part | None = None) -> Keeper | None:
    """None where nobody keeps anything: outside dtp. Raises `StorageError`."""
    uri = os.environ.get(Env.STORAGE)
    return Keeper(open_storage(uri), world, stop, part) if uri else None
