"""A smoke run: ``dtp run --steps N`` lets a job train so many steps and end well."""

from __future__ import annotations

import os
import statistics
import time

from dtp_trainer.inspection import STOP_AFTER
from dtp_trainer.session.telemetry import Position


class Rehearsal:
    """Counts the steps of one rank; never over where nobody set ``DTP_STOP_AFTER``."""

    def __init__(self) -> None:
        wanted = os.environ.get(STOP_AFTER, "")
        self._steps = int(wanted) if wanted.isdigit() else 0
        self._at = time.perf_counter()
        self._seconds: list[float] = []

    def over(self, position: Position) -> bool:
        """After each step: it was the last one."""
        if not self._steps:
            return False
        now = time.perf_counter()
        self._seconds.append(now - self._at)
        self._at = now
        return position.step >= self._steps

    def summary(self, position: Position) -> str:
        """How many steps there were, and how fast: the first one apart, as it warms up."""
        first, *rest = self._seconds
        usual = statistics.median(rest or [first])
        words = [f"{_seconds(usual)} a step"]
        if rest:
            words.insert(0, f"the first took {_seconds(first)}, then")
        rates = {"samples/s": position.samples, "tokens/s": position.tokens or 0}
        words += [f"{amount / usual:,.0f} {unit}" for unit, amount in rates.items() if amount]
        told = ", ".join(words).replace("then,", "then")
        steps = f"{position.step} step{'' if position.step == 1 else 's'}"
        return f"ended after {steps}, as asked: {told}"


def _seconds(seconds: float) -> str:
    """
    >>> _seconds(1.234), _seconds(0.01234)
    ('1.23 s', '12.3 ms')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
