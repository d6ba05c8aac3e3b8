"""The learning rate's factor by step: up along a line first, then as the name says."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import assert_never


class Schedule(StrEnum):
    COSINE = "cosine"
    """Down to a tenth along half a cosine."""
    LINEAR = "linear"
    """Down to a tenth along a line."""
    CONSTANT = "constant"
    STEP = "step"
    """To a tenth after half of the steps, and again after three quarters."""


def factor(schedule: Schedule, *, warmup: int, total: int) -> Callable[[int], float]:
    """Of the highest learning rate, for each step from 0 on; `warmup` of `total` steps go up.

    >>> linear = factor(Schedule.LINEAR, warmup=2, total=12)
    >>> [round(linear(step), 2) for step in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return _later(schedule, min((step - warmup) / max(1, total - warmup), 1.0))

    return at


def _later(schedule: Schedule, done: float) -> float:
    match schedule:
        case Schedule.COSINE:
            return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        case Schedule.LINEAR:
            return 1 - 0.9 * done
        case Schedule.CONSTANT:
            return 1.0
        case Schedule.STEP:
            return 0.1 ** ((done >= 1 / 2) + (done >= 3 / 4))
        case unreachable:
            assert_never(unreachable)
