"""Where the time of a job's steps goes, over all ranks, and the word for it. Pure.

The ranks of a step wait for each other in its communication, so all steps are as long as the
slowest rank's. The straggler is the rank that waits least while the others wait long.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

STRAGGLER_SHARE = 0.2
"""Of the step: what the median of the others waits longer than the one that waits least."""
DATA_SHARE = 0.2
COMM_SHARE = 0.2
CHECKPOINT_SHARE = 0.1
NEWEST_COUNTS = 0.3
"""Of a window, beside those before it: a verdict that changes each second tells nothing."""

_NOT_OF_THE_STEP = frozenset({"step", "evaluate"})

Seconds = Mapping[str, float]
"""Phase → seconds a step."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attribution:
    """What the ranks of one generation told so far."""

    ranks: Mapping[int, Seconds] = dataclasses.field(default_factory=dict)
    """Smoothed over the windows."""
    windows: Mapping[int, tuple[float, int]] = dataclasses.field(default_factory=dict)
    """Worker → when its newest window ended, and how many there were."""

    @property
    def step_s(self) -> float | None:
        """Of the mean rank."""
        steps = [seconds["step"] for seconds in self.ranks.values() if "step" in seconds]
        return statistics.fmean(steps) if steps else None

    @property
    def shares(self) -> dict[str, float]:
        """Phase → share of the step, by the means over the ranks; together 1."""
        whole = self.step_s
        if not whole:
            return {}
        phases = {name for seconds in self.ranks.values() for name in seconds} - _NOT_OF_THE_STEP
        return {
            name: statistics.fmean(s.get(name, 0.0) for s in self.ranks.values()) / whole
            for name in sorted(phases)
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the steps are bound by; empty words while nobody can tell."""

    word: str = ""
    """``data-bound``, ``comm-bound``, ``straggler rank 3``, ``checkpoint`` or ``compute``."""
    why: str = ""
    """Of a straggler: how long it takes, and in which phase."""


def told(
    known: Attribution, worker: int, window_at: float, phases: Mapping[str, Seconds]
) -> Attribution:
    """A worker's ranks (by their names) in the window that ended then; one that was told before
    adds nothing."""
    newest, count = known.windows.get(worker, (float("-inf"), 0))
    if window_at <= newest or not phases:
        return known
    windows = {**known.windows, worker: (window_at, count + 1)}
    # The first window of a generation holds its warming up, which says nothing of the rest.
    weight = 1.0 if count < 2 else NEWEST_COUNTS
    fresh = {
        int(rank): _mixed(known.ranks.get(int(rank), seconds), seconds, weight)
        for rank, seconds in phases.items()
    }
    return Attribution({**known.ranks, **fresh}, windows)


def verdict(known: Attribution) -> Verdict:
    """By the thresholds above: a straggler first, else the largest share that is past its own."""
    shares = known.shares
    if not shares:
        return Verdict()
    if (found := _straggler(known)) is not None:
        return found
    bounds = {
        "data-bound": (shares.get("data", 0.0) + shares.get("h2d", 0.0), DATA_SHARE),
        "comm-bound": (shares.get("comm", 0.0), COMM_SHARE),
        "checkpoint": (shares.get("checkpoint", 0.0), CHECKPOINT_SHARE),
    }
    past = {word: share for word, (share, bound) in bounds.items() if share >= bound}
    if past:
        return Verdict(max(past, key=lambda word: past[word]))
    complete = "forward" in shares and (len(known.ranks) == 1 or "comm" in shares)
    return Verdict("compute") if complete else Verdict()


def _straggler(known: Attribution) -> Verdict | None:
    waits = {rank: seconds["comm"] for rank, seconds in known.ranks.items() if "comm" in seconds}
    step_s = known.step_s
    if len(waits) < 2 or len(waits) < len(known.ranks) or not step_s:
        return None
    slowest = min(waits, key=lambda rank: (waits[rank], rank))
    others = statistics.median(wait for rank, wait in waits.items() if rank != slowest)
    if others - waits[slowest] < STRAGGLER_SHARE * step_s:
        return None
    return Verdict(f"straggler rank {slowest}", _where(known.ranks, slowest))


def _where(ranks: Mapping[int, Seconds], slowest: int) -> str:
    """The phase in which it takes longest beside the median of the others."""
    rest = [seconds for rank, seconds in ranks.items() if rank != slowest]
    longer = {
        name: seconds - statistics.median(other.get(name, 0.0) for other in rest)
        for name, seconds in ranks[slowest].items()
        if name not in _NOT_OF_THE_STEP
    }
    phase = max(longer, key=lambda name: longer[name])
    place = "the rest of its loop" if phase == "other" else phase
    return f"{longer[phase] * 1000:.0f} ms a step longer than the others in {place}"


def _mixed(old: Seconds, new: Seconds, weight: float) -> dict[str, float]:
    return {
        name: (1 - weight) * old.get(name, 0.0) + weight * new.get(name, 0.0)
        for name in {**old, **new}
    }
