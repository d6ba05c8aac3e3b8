"""This rank's batches from a step on, one after the other, on its device."""

from __future__ import annotations

from typing import Any

from dtp_trainer.session.course import Course
from dtp_trainer.session.distributed import World
from dtp_trainer.session.loader import Collate, Dataset, Loader
from dtp_trainer.session.phases import Phases
from dtp_trainer.session.transport import Transport


class Feed:
    """Goes on where it is asked to: a job that goes back to a checkpoint asks for its step."""

    def __init__(
        self, dataset: Dataset, course: Course, world: World, *, collate: Collate | None, ahead: int
    ) -> None:
        self._dataset, self._course, self._world = dataset, course, world
        self._collate, self._ahead = collate, ahead
        self._transport = Transport(world.device)
        self._loader: Loader | None = None
        self._next = 0

    def after(self, step: int, watch: Phases) -> Any:
        """The batch of the step that follows `step`."""
        if self._loader is None or step != self._next:
            self._open(step)
        assert self._loader is not None
        with watch.phase("data"):
            fetched = next(self._loader)
        self._next = step + 1
        with watch.phase("h2d"):
            return self._transport.receive(fetched)

    def close(self) -> None:
        """No thread of it draws from a random generator any more."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _open(self, step: int) -> None:
        self.close()
        order = self._course.indices(step, self._world.rank, self._world.size)
        self._loader = Loader(
            self._dataset,
            order,
            collate=self._collate,
            ahead=self._ahead,
            send=self._transport.send,
        )
