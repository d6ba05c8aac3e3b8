"""The way through the data: how many steps there are, and which of them end an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dtp_trainer.sampler import Indices, Lanes


@dataclass(frozen=True, slots=True)
class Course:
    """All steps of a job, over all attempts and at any world size."""

    lanes: Lanes
    total_steps: int

    def epoch(self, step: int) -> float:
        """Epochs that `step` steps are worth."""
        return step / self.lanes.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        return step % self.lanes.steps_per_epoch == 0

    def ends(self, step: int) -> bool:
        return step == self.total_steps

    @property
    def samples(self) -> int:
        """Of a step, over all ranks."""
        return self.lanes.global_batch

    def indices(self, after: int, rank: int, world_size: int) -> Iterator[Indices]:
        """The samples of one rank for each step that is left `after` so many."""
        for step in range(after, self.total_steps):
            at = self.lanes.at_step(step)
            yield self.lanes.indices(at.epoch, at.step, rank, world_size)

    def state(self, step: int) -> dict[str, int]:
        """What a checkpoint keeps of the data."""
        return self.lanes.state(self.lanes.at_step(step))


@dataclass(frozen=True, slots=True)
class OwnLoop:
    """The course of a script that walks a loop of its own: nothing is known of it."""

    total_steps: None = None
    samples: int = 0

    def epoch(self, _step: int) -> float:
        return 0.0

    def ends_epoch(self, _step: int) -> bool:
        return False

    def ends(self, _step: int) -> bool:
        return False

    def state(self, _step: int) -> dict[str, int]:
        return {}


def plan(lanes: Lanes, world_size: int, *, epochs: int | None, steps: int | None) -> Course:
    """Training ends after `epochs` or `steps`, whichever is less.

    Raises:
        SamplerError: so many ranks cannot share the global batch.
        ValueError: neither end is given.
    """
    lanes.check_world_size(world_size)
    ends = [steps] if steps is not None else []
    if epochs is not None:
        ends.append(epochs * lanes.steps_per_epoch)
    if not ends:
        raise ValueError("batches() needs epochs, or steps, or both: then the shorter one ends it")
    return Course(lanes, min(ends))
