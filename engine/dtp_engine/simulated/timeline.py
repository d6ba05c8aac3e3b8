"""The steps of a simulated gang over time, as stretches of constant speed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Segment:
    """One generation at work; what logs are made from."""

    start: float
    generation: int
    workers: tuple[int, ...]
    """In the order of their ranks."""
    step: int
    """At the start."""
    step_s: float
    end: float = NEVER
    stuck_at: float = NEVER
    """From when on no step is taken."""

    def step_at(self, at: float) -> int:
        """Completed steps of the job."""
        run_s = max(min(at, self.end, self.stuck_at) - self.start, 0.0)
        return self.step + int(run_s / self.step_s + 1e-6)

    def when(self, step: int) -> float:
        """When the step completes; `NEVER` if the segment gets stuck before."""
        at = self.start + max(step - self.step, 0) * self.step_s
        return at if at < self.stuck_at else NEVER


@dataclass(slots=True)
class Timeline:
    segments: list[Segment] = field(default_factory=list)

    @property
    def current(self) -> Segment | None:
        """The one that is under way."""
        return self.segments[-1] if self.segments and self.segments[-1].end == NEVER else None

    @property
    def last(self) -> Segment | None:
        return self.segments[-1] if self.segments else None

    def at(self, at: float) -> Segment | None:
        """The one under way at that time."""
        return next((s for s in reversed(self.segments) if s.start < at <= s.end), None)

    def begin(self, segment: Segment) -> None:
        self.segments.append(segment)

    def close(self, at: float) -> None:
        if self.current is not None:
            self.segments[-1] = replace(self.segments[-1], end=at)

    def freeze(self, at: float) -> None:
        if self.current is not None:
            self.segments[-1] = replace(self.segments[-1], stuck_at=at)
