"""Where a job stands, and what is kept of it: resume, go back, checkpoint, commit."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from dtp_trainer.checkpoints.checkpoint import LoadedCheckpoint
from dtp_trainer.session.agreement import Decision, Leave
from dtp_trainer.session.course import Course, OwnLoop
from dtp_trainer.session.distributed import World
from dtp_trainer.session.feed import Feed
from dtp_trainer.session.guard import Guard
from dtp_trainer.session.keeper import Keeper, Kept, Snapshot
from dtp_trainer.session.phases import Phases
from dtp_trainer.session.state import TrainingState
from dtp_trainer.session.telemetry import Position, Telemetry, say


class Standing:
    """The newest completed step of a job, its way through the data, and its checkpoints, if anybody
    keeps any. All ranks call its methods at the same places."""

    step: int
    """Completed since the job began, over all attempts."""

    def __init__(
        self,
        state: TrainingState,
        guard: Guard,
        keeper: Keeper | None,
        telemetry: Telemetry,
        world: World,
    ) -> None:
        self._state, self._guard, self._keeper = state, guard, keeper
        self._telemetry, self._world = telemetry, world
        self._loaded: LoadedCheckpoint | None = None
        self._feed: Feed | None = None
        self.course: Course | OwnLoop = OwnLoop()
        self.step = 0
        self._first = 1

    @property
    def is_at_first(self) -> bool:
        """The newest step is the first one of this process."""
        return self.step == self._first

    def resume(self) -> None:
        """From the newest good checkpoint. Raises ValueError where it is of another script."""
        loaded = self._keeper.newest() if self._keeper else None
        if loaded is not None:
            self._stand_at(loaded)
            self.tell(f"resumed from step {loaded.step} of generation {loaded.entry.generation}")
        self._first = self.step + 1

    def walk(self, course: Course) -> None:
        """From now on along a course. Raises `SamplerError` where the place that a checkpoint noted
        means nothing on it."""
        if self._loaded is not None and "epoch" in self._loaded.data_state:
            course.lanes.position(self._loaded.data_state)
        self.course = course

    def fed_by(self, feed: Feed) -> None:
        """Nothing has drawn from the random generators since they were restored."""
        self._feed = feed
        if self._loaded is not None:
            self._state.load_random(self._loaded)

    def go_back(self) -> bool:
        """To the newest checkpoint; False where there is none, or no feed that could go back."""
        if self._feed is not None:
            self._feed.close()
        loaded = self._keeper.go_back() if self._keeper and self._feed else None
        self._guard.went_back(loaded.step if loaded else None)
        if loaded is not None:
            self._stand_at(loaded)
            self.tell(f"went back to step {loaded.step}")
        return loaded is not None

    def decide(self) -> Decision:
        """What all ranks do after the newest step."""
        if self._keeper is None:
            return Decision()
        ends_epoch, ends = self.course.ends_epoch(self.step), self.course.ends(self.step)
        return self._keeper.decide(self.step, epoch_end=ends_epoch, last=ends)

    def leave_now(self) -> Leave:
        return self._keeper.leave_now(self.step) if self._keeper else Leave.NO

    def checkpoint(self, decision: Decision, watch: Phases) -> None:
        """In the background, where it was decided; after the first step only make room for later
        ones, as the optimizer has its state by then."""
        if self._keeper is None or decision.leave is not Leave.NO:
            return
        if decision.checkpoint:
            with watch.phase("checkpoint"):
                self._keeper.save(self._snapshot())
        elif self.is_at_first:
            self._keeper.prepare(self._state.bundle())

    def commit(self) -> Kept:
        """Until the newest step is in a checkpoint."""
        return self._keeper.commit(self.step, self._snapshot) if self._keeper else Kept.YES

    def settle(self, why: str) -> None:
        """Keep nothing more, and tell why."""
        self.tell(why)
        if self._keeper is not None:
            self._keeper.settle()

    def last_word(self) -> None:
        """For a rank that ends by itself: its share of what is being written is still written."""
        if self._keeper is not None:
            self._keeper.last_word()

    def end_together(self, *, own: bool) -> None:
        """For all ranks at the same step: a checkpoint that is being written is still committed,
        and the ranks whose fault it is (`own`) leave first, so that one of them is named."""
        if self._keeper is not None:
            self._keeper.settle()
        if not own:
            with contextlib.suppress(RuntimeError):  # raised when a rank that left is missed
                self._world.maximum([0])

    def stop_feeding(self) -> None:
        if self._feed is not None:
            self._feed.close()

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()

    def position(self, samples: int | None, tokens: int | None) -> Position:
        """For a report of the newest step."""
        return Position(
            step=self.step,
            epoch=self.course.epoch(self.step),
            total_steps=self.course.total_steps,
            samples=self.course.samples if samples is None else samples,
            tokens=tokens,
        )

    def tell(self, text: str) -> None:
        """Once, not on every rank."""
        if self._world.rank == 0:
            say(text)

    def _stand_at(self, loaded: LoadedCheckpoint) -> None:
        self._loaded = replace(loaded, shared={})  # not held beside the model for ever
        self._state.load(loaded)
        self._state.load_random(loaded)
        self._guard.load(loaded.data_state)
        self.step = loaded.step

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            bundle=self._state.bundle(),
            step=self.step,
            epoch=self.course.epoch(self.step),
            values=self._telemetry.values,
            data_state={**self.course.state(self.step), **self._guard.state()},
        )
