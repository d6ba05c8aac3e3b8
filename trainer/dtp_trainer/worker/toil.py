"""How far rank 0 is in its generation, and what its steps took together."""

from __future__ import annotations

from collections.abc import Iterable

from dtp_trainer.gang.messages import Effort
from dtp_trainer.wire import Step


class Toil:
    """Adds up the step records of rank 0; those of other ranks are left aside."""

    def __init__(self) -> None:
        self.effort: Effort | None = None

    def add(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if step.rank == 0:
                self._count(step.step, step.seconds.get("step", 0.0))

    def _count(self, step: int, seconds: float) -> None:
        known = self.effort or Effort(step - 1, step - 1, 0.0)
        reached = max(step, known.reached)
        self.effort = Effort(known.began, reached, round(known.seconds + seconds, 6))
