"""What training has cost so far, step by step, and what of it has to be done again. Pure.

Rank 0 tells how far it is and how many seconds its steps took. Generations start from checkpoints,
so a new one may begin before the place where the last one ended: what lies between is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from dtp_trainer.gang.messages import Effort

KEPT = 256
"""Points; when there are more, every second one of the older half goes."""


@dataclass(frozen=True, slots=True)
class Point:
    step: int
    seconds: float
    """What all steps up to this one took, from an origin of no meaning."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Steps that were taken and have to be taken again."""

    reached: int
    back_to: int
    seconds: float | None
    """None: nobody told how long they took."""

    @property
    def steps(self) -> int:
        return max(0, self.reached - self.back_to)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Of the steps that the newest generation stands on."""

    points: tuple[Point, ...] = ()
    """Growing in both."""
    reached: int | None = None
    """The newest step that any rank completed; None before the job's first."""
    begun: int | None = None
    """The step that the running generation started from, once it has told."""

    def between(self, earlier: int, later: int) -> float | None:
        """Seconds of training from after one step to the end of another."""
        first, last = self._at(earlier), self._at(later)
        return None if first is None or last is None else max(0.0, last - first)

    def _at(self, step: int) -> float | None:
        """Between two points, and beyond them, as if all steps there took the same."""
        if len(self.points) < 2:
            return None
        pairs = [*pairwise(self.points)]
        before, after = next((pair for pair in pairs if step <= pair[1].step), pairs[-1])
        pace = (after.seconds - before.seconds) / max(1, after.step - before.step)
        return before.seconds + pace * (step - before.step)


def inherited(step: int | None, kept: int, unsaved_s: float | None) -> Ledger:
    """What ``gang.json`` tells a new leader: `kept` is the step of the newest checkpoint."""
    if step is None or unsaved_s is None or step <= kept:
        return Ledger(reached=step)
    return Ledger((Point(kept, 0.0), Point(step, unsaved_s)), step)


def opened(ledger: Ledger, newest: int) -> Ledger:
    """The next generation starts; `newest` is the last one's newest step, 0 if it took none."""
    return replace(ledger, reached=newest or ledger.reached, begun=None)


def begins(ledger: Ledger, told: Effort) -> bool:
    """Whether this is the first word of a generation."""
    return ledger.begun is None and told.reached > 0


def went_back(ledger: Ledger, told: Effort) -> tuple[Ledger, Loss | None]:
    """A generation has told where it began; None when there was nothing before it."""
    loss = None
    if ledger.reached is not None:
        seconds = ledger.between(told.began, ledger.reached)
        loss = Loss(ledger.reached, told.began, seconds)
    at = ledger._at(told.began) or 0.0  # noqa: SLF001 - of its own kind
    kept = tuple(p for p in ledger.points if p.step < told.began and p.seconds <= at)
    points = (*kept, Point(told.began, at))
    return Ledger(points, told.began, told.began), loss


def advanced(ledger: Ledger, told: Effort) -> Ledger:
    """Rank 0 is further; `told` counts from where its generation began."""
    origin = next((p for p in ledger.points if p.step == ledger.begun), None)
    reached = max(told.reached, ledger.reached or 0)
    if origin is None or told.reached <= ledger.points[-1].step:
        return replace(ledger, reached=reached)
    newest = Point(told.reached, origin.seconds + told.seconds)
    return replace(ledger, points=_thinned((*ledger.points, newest), origin), reached=reached)


def _thinned(points: tuple[Point, ...], keep: Point) -> tuple[Point, ...]:
    if len(points) <= KEPT:
        return points
    old, new = points[: KEPT // 2], points[KEPT // 2 :]
    return (*(p for i, p in enumerate(old) if i % 2 == 0 or p == keep), *new)


# -------------------------------------------------------------------------------------------- words


def describe(loss: Loss) -> str:
    """
    >>> describe(Loss(130, 120, 4.13))
    'went back from step 130 to 120: 10 steps, 4.1 s of training lost'
    >>> describe(Loss(130, 130, 0.0))
    'goes on at step 130: no step redone'
    """
    if not loss.steps:
        return f"goes on at step {loss.back_to}: no step redone"
    return f"went back from step {loss.reached} to {loss.back_to}: {amount(loss)} lost"


def amount(loss: Loss) -> str:
    """
    >>> amount(Loss(3, 2, None)), amount(Loss(900, 100, 301.0))
    ('1 step', '800 steps, 5 min of training')
    """
    steps = f"{loss.steps} step{'' if loss.steps == 1 else 's'}"
    return steps if loss.seconds is None else f"{steps}, {_duration(loss.seconds)} of training"


def _duration(seconds: float) -> str:
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
