"""All ranks decide the same at the same step: leave, checkpoint, and when to ask again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum

from dtp_trainer.distributed import World

ASK_EVERY_S = 0.05
ASK_WITHIN_STEPS = 16
"""A step that suddenly takes long makes the next question late by no more than so many of them."""


class Leave(IntEnum):
    """Ordered: the strongest wish of any rank wins."""

    NO = 0
    PAUSED = 1
    FENCED = 2


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do after the step."""

    leave: Leave = Leave.NO
    checkpoint: bool = False


class Agreement:
    """One small reduction about every 50 ms, not every step. Its own result says after how many
    steps the next one is, so the ranks, which count the same steps, always meet."""

    def __init__(self, world: World, step: int) -> None:
        self._world = world
        self._asked_step, self._asked_at = step, time.perf_counter()
        self._next_step = step + 1

    def due(self, step: int) -> bool:
        return step >= self._next_step

    def reach(self, step: int, wish: Decision) -> Decision:
        """The strongest of all ranks' wishes; a collective, for every rank after the same step."""
        answer = [int(wish.leave), int(wish.checkpoint), self._proposal(step)]
        leave, checkpoint, interval = self._world.maximum(answer)
        self._asked_step, self._asked_at = step, time.perf_counter()
        self._next_step = step + interval
        return Decision(Leave(leave), bool(checkpoint))

    def _proposal(self, step: int) -> int:
        steps = step - self._asked_step
        if steps <= 0:
            return 1
        elapsed = max(time.perf_counter() - self._asked_at, 1e-6)
        return min(max(round(ASK_EVERY_S * steps / elapsed), 1), ASK_WITHIN_STEPS)
