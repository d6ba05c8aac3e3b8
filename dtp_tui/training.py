"""How far a training is, from the windows of its log; pure."""

from __future__ import annotations

from dtp_engine.backend import LogLine
from dtp_trainer import wire
from dtp_tui import labels

SHOWN_FIRST: tuple[str, ...] = ("loss", "accuracy")
"""Reported values that one line of progress has room for."""


class Progress:
    """What is known of the training so far, from rank 0's windows over all attempts."""

    def __init__(self) -> None:
        self.window: wire.Window | None = None
        self.values: dict[str, float] = {}
        """The newest of each reported value."""
        self._steps_per_s: float | None = None

    def add(self, window: wire.Window) -> None:
        before = self.window
        self.window = window
        self.values |= window.values
        if before is None or before.generation != window.generation:
            self._steps_per_s = None
        elif window.at > before.at and window.step > before.step:
            now = (window.step - before.step) / (window.at - before.at)
            old = self._steps_per_s
            self._steps_per_s = now if old is None else 0.7 * old + 0.3 * now

    @property
    def left_s(self) -> float | None:
        """Seconds to the last step, at the speed of the last windows."""
        if self.window is None or self.window.total_steps is None or not self._steps_per_s:
            return None
        return max(self.window.total_steps - self.window.step, 0) / self._steps_per_s

    def words(self, *, most_values: int = 2) -> list[str]:
        """``loss 0.123``, ``1.2k/s``, ``ETA 12s``: what is known of them."""
        if self.window is None:
            return []
        names = [name for name in SHOWN_FIRST if name in self.values] or list(self.values)[:1]
        shown = names[:most_values]
        said = [f"{name} {labels.value(self.values[name], name)}" for name in shown]
        tokens, samples = self.window.tokens_per_s, self.window.samples_per_s
        if tokens is not None:
            said.append(f"{labels.count(tokens)} tok/s")
        elif samples is not None:
            said.append(f"{labels.count(samples)}/s")
        if self.left_s:
            said.append(f"ETA {labels.duration(self.left_s)}")
        return said


def job_window(line: LogLine) -> wire.Window | None:
    """The job's own window in a line of its log, which is rank 0's."""
    record = line.record
    return record if isinstance(record, wire.Window) and record.rank == 0 else None
