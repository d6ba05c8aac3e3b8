"""What outlives the workers of a simulated job: its checkpoints, its generation, its events."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtp_trainer import wire

KEPT_EVENTS = 200


@dataclass(slots=True)
class JobMemory:
    """Stands for ``jobs/<id>/`` in storage."""

    job_id: str
    generation: int = 0
    entries: list[wire.CheckpointEntry] = field(default_factory=list)
    resume: str | None = None
    events: list[wire.GangEvent] = field(default_factory=list)
    told: int = 0
    """Number of the last event."""
    leader: int | None = None
    """Worker of the newest attempt that tells the next events."""
    tellers: dict[int, int | None] = field(default_factory=dict)
    """Number of an event → the worker that told it."""
    met: set[int] = field(default_factory=set)
    """Steps at which the script has failed or hung already."""

    @property
    def step(self) -> int:
        """From which the next generation goes on."""
        chosen = [entry.step for entry in self.entries if entry.name == self.resume]
        return chosen[0] if chosen else 0

    def tell(self, at: float, name: str, text: str, *, step: int | None = None) -> None:
        self.told += 1
        self.tellers[self.told] = self.leader
        event = wire.GangEvent(self.told, at, name, text, self.generation, step)
        self.events = [*self.events[-KEPT_EVENTS + 1 :], event]

    def commit(self, entry: wire.CheckpointEntry, *, keep: int) -> None:
        """A checkpoint of a step that is there already changes nothing."""
        if any(old.name == entry.name for old in self.entries):
            return
        self.entries = [*self.entries, entry][-max(keep, 2) :]
        self.resume = entry.name
        text = f"checkpoint {entry.name}, {entry.bytes / 1e6:.1f} MB"
        self.tell(entry.at, "checkpoint", text, step=entry.step)

    def choose(self, step: int) -> None:
        """Go on from the checkpoint of that step, if there is one."""
        for entry in self.entries:
            if entry.step == step:
                self.resume = entry.name

    def head(self) -> wire.CheckpointHead:
        return wire.CheckpointHead(self.generation, self.resume, tuple(self.entries))
