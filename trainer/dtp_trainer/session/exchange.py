"""How long the backward pass waits for other ranks, from the numbers that DDP keeps of itself.

They are no public interface of torch: where one is missing there is no number, and nothing else
changes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

SAMPLE_S = 0.25
"""A step is measured about this often. Reading costs 60 µs."""
LARGEST_RATE = 100
"""DDP's own: one step in so many is measured, and each of the first ten."""


class Exchange:
    """Of the gradients of all models that are followed.

    choose_rate: let DDP measure steps by `SAMPLE_S`. On a GPU, DDP waits for the device when it
    reads a step that it measured; there its own rate is left as it is.
    """

    def __init__(self, *, choose_rate: bool) -> None:
        self._choose_rate = choose_rate
        self._models: list[Any] = []
        self._rate = LARGEST_RATE
        self._looked_at = float("-inf")
        self._exposed_s: float | None = None

    def follow(self, module: nn.Module) -> None:
        """Of other modules than DDP nothing is known."""
        if isinstance(module, DistributedDataParallel):
            self._models.append(module)

    def exposed_s(self, step_s: float) -> float | None:
        """Communication that was not hidden behind computing, in the newest measured step; None
        when nobody knows. `step_s`: about how long steps take."""
        now = time.perf_counter()
        if not self._models or now - self._looked_at < SAMPLE_S:
            return self._exposed_s
        self._looked_at = now
        try:
            self._exposed_s = self._read()
            self._set_rate(step_s)
        except Exception:  # noqa: BLE001 - whatever another version of torch does
            self._models, self._exposed_s = [], None
        return self._exposed_s

    def _read(self) -> float | None:
        found = [_exposed_s(model._get_ddp_logging_data()) for model in self._models]  # noqa: SLF001
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if known else None

    def _set_rate(self, step_s: float) -> None:
        rate = max(1, min(LARGEST_RATE, round(SAMPLE_S / max(step_s, 1e-6))))
        if not self._choose_rate or rate == self._rate:
            return
        self._rate = rate
        for model in self._models:
            model._set_ddp_runtime_logging_sample_rate(rate)  # noqa: SLF001


def _exposed_s(data: Mapping[str, Any]) -> float | None:
    """None before the first measured step."""
    whole, hidden = data.get("backward_comm_time"), data.get("backward_compute_comm_overlap_time")
    if whole is None or hidden is None:
        return None
    return max(0.0, (int(whole) - int(hidden)) / 1e9)
