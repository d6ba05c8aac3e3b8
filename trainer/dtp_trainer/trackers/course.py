"""Records of a job → rows for trackers: named, thinned, in the order of steps. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from statistics import fmean

from dtp_trainer.measures import measured, used
from dtp_trainer.trackers.tracker import Row
from dtp_trainer.wire import Host, Window

ROWS = 20_000
"""A job of age T is logged every T / ROWS: each second for five hours, twice a minute after a
week."""
MACHINES_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Back:
    """Steps after this one are trained again."""

    step: int


class Course:
    """`began`: Unix time of the first record of the job, once known."""

    def __init__(self, began: float | None = None) -> None:
        self.began = began
        self.step = 0
        """The newest one of a row that was given."""
        self._heard = -1
        """The newest step of a window."""
        self._generation = -1
        self._pending: dict[str, tuple[int, float, float]] = {}
        self._logged_at = float("-inf")
        self._hosts: dict[int, list[dict[str, float]]] = {}
        self._hosts_logged_at: float | None = None

    def window(self, window: Window) -> Iterator[Row | Back]:
        """Of rank 0, in the order of time. A value that is reported now and then is never lost,
        however thin the rest."""
        self.began = window.at if self.began is None else self.began
        start = max(0, window.step - window.steps)
        if window.generation != self._generation or window.step < self._heard:
            yield from self.flush()
            self._generation = window.generation
            yield Back(start)
        self._heard = window.step
        for name, value in measured(window).items():
            self._pending[name] = (window.step, window.at, value)
        if window.at - self._logged_at >= (window.at - self.began) / ROWS:
            yield from self.flush()
            self._logged_at = window.at

    def flush(self) -> Iterator[Row]:
        steps: dict[int, dict[str, tuple[float, float]]] = {}
        for name, (step, at, value) in self._pending.items():
            steps.setdefault(step, {})[name] = (at, value)
        self._pending.clear()
        for step, found in sorted(steps.items()):
            self.step = step
            at = max(at for at, _ in found.values())
            yield Row(at, step, {name: value for name, (_, value) in found.items()})

    def host(self, host: Host) -> Iterator[Row]:
        """A row about all workers now and then, with their means since the last one."""
        self.began = host.at if self.began is None else self.began
        if self._hosts_logged_at is None:
            self._hosts_logged_at = host.at
        self._hosts.setdefault(host.worker, []).append(used(host))
        if host.at - self._hosts_logged_at >= MACHINES_EVERY_S:
            self._hosts_logged_at = host.at
            yield from self.flush_machines(host.at)

    def flush_machines(self, at: float) -> Iterator[Row]:
        values = {
            f"worker{worker}/{name}": fmean(sample[name] for sample in samples)
            for worker, samples in sorted(self._hosts.items())
            for name in samples[-1]
            if all(name in sample for sample in samples)
        }
        self._hosts.clear()
        if values:
            yield Row(at, max(0, round(at - (self.began or at))), values)
