"""All ranks decide the same at the same step: leave, checkpoint, and when to ask again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from dtp_trainer.session.distributed import World

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
    """What a rank wishes, or what all ranks do, after a step."""

    leave: Leave = Leave.NO
    checkpoint: bool = False


class Agreement:
    """One small reduction about every 50 ms, not every step.

    It runs beside the next step, after which all ranks act on it; so nobody waits for the slowest
    rank just to be told that nothing is wanted. Its own result says after how many steps the next
    one is: the ranks, which count the same steps, always meet.
    """

    def __init__(self, world: World, step: int) -> None:
        self._world = world
        self._asked_step, self._asked_at = step, time.perf_counter()
        self._next_step = step + 1
        self._answer: Callable[[], list[int]] | None = None

    def decide(self, step: int, wish: Callable[[], Decision]) -> Decision:
        """The strongest wish of any rank when it was last asked; often nothing was asked. Every
        rank calls it after every step."""
        decided = self._heard()
        if decided.leave is Leave.NO and step >= self._next_step:
            self._ask(step, wish(), decided)
        return decided

    def decide_now(self, step: int, wish: Callable[[], Decision]) -> Decision:
        """The strongest wish of any rank at this moment; waits for the slowest one."""
        before = self._heard()
        self._ask(step, wish(), before)
        now = self._heard()
        checkpoint = before.checkpoint or now.checkpoint
        return Decision(max(before.leave, now.leave), checkpoint)

    def settle(self) -> None:
        """Nothing of it is under way any more; what was asked last is forgotten."""
        self._heard()

    def _ask(self, step: int, wish: Decision, decided: Decision) -> None:
        """A checkpoint that is just decided is not wished again."""
        checkpoint = wish.checkpoint and not decided.checkpoint
        proposal = [int(wish.leave), int(checkpoint), self._interval(step)]
        self._asked_step, self._asked_at = step, time.perf_counter()
        self._answer = self._world.maximum_later(proposal)

    def _heard(self) -> Decision:
        if self._answer is None:
            return Decision()
        leave, checkpoint, interval = self._answer()
        self._answer = None
        self._next_step = self._asked_step + interval
        return Decision(Leave(leave), bool(checkpoint))

    def _interval(self, step: int) -> int:
        steps = step - self._asked_step
        if steps <= 0:
            return 1
        elapsed = max(time.perf_counter() - self._asked_at, 1e-6)
        return min(max(round(ASK_EVERY_S * steps / elapsed), 1), ASK_WITHIN_STEPS)
