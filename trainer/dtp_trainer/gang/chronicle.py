"""The events of a gang, numbered without gaps over all leaders and attempts. Pure."""

from __future__ import annotations

import dataclasses

from dtp_trainer.checkpoints.grace import size
from dtp_trainer.wire import CheckpointEntry, Gang, GangEvent

KEPT = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Chronicle:
    events: tuple[GangEvent, ...] = ()
    """The newest, oldest first."""
    generation: int = 0
    """Which the next events belong to."""
    checkpoint: tuple[int, int] = (0, 0)
    """Generation and step of the newest checkpoint that was told of; they only grow."""

    @property
    def seq(self) -> int:
        """Number of the last event; 0 before the first."""
        return self.events[-1].seq if self.events else 0

    def tell(
        self,
        at: float,
        name: str,
        text: str,
        *,
        step: int | None = None,
        worker: int | None = None,
        rank: int | None = None,
    ) -> Chronicle:
        event = GangEvent(
            self.seq + 1, at, name, text, self.generation, step=step, worker=worker, rank=rank
        )
        return dataclasses.replace(self, events=(*self.events, event)[-KEPT:])

    def tells_of(self, name: str) -> bool:
        """Whether the generation has such an event."""
        told = (event for event in self.events if event.generation == self.generation)
        return any(event.name == name for event in told)

    def in_generation(self, generation: int) -> Chronicle:
        return dataclasses.replace(self, generation=generation)

    def committed(self, entry: CheckpointEntry) -> Chronicle:
        """A checkpoint exists; told once."""
        if (entry.generation, entry.step) <= self.checkpoint:
            return self
        text = f"checkpoint {entry.name}, {size(entry.bytes)}"
        told = self.tell(entry.at, "checkpoint", text, step=entry.step)
        return dataclasses.replace(told, checkpoint=(entry.generation, entry.step))


def continued(gang: Gang | None) -> Chronicle:
    """Where the last leader stopped, of this attempt or an older one."""
    if gang is None:
        return Chronicle()
    told = [(e.generation, e.step or 0) for e in gang.events if e.name == "checkpoint"]
    if not told and len(gang.events) >= KEPT:  # They are older than what is kept.
        told = [(gang.generation, gang.step or 0)]
    return Chronicle(gang.events, gang.generation, max(told, default=(0, 0)))
