"""Where the time of a step goes, found from outside: the script need not cooperate.

A step is a line of borders; from each border on, time belongs to one phase. Hooks on the model and
on the optimizer set the borders of ``forward``, ``backward`` and ``optimizer``; `Session` sets
those of ``data``, ``h2d``, ``checkpoint`` and ``evaluate``; what is left is ``other``.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from dtp_trainer.session.exchange import Exchange

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
EVALUATE, OTHER, COMM, STEP = "evaluate", "other", "comm", "step"
READ_AFTER_LAPS = 2
"""On a GPU: the host is ahead of the device by less than this many steps, as a rule."""
FORGET_AFTER_LAPS = 16

Mark: TypeAlias = "float | torch.cuda.Event"


class HostClock:
    """Moments of this thread: what it does is what takes the time."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: list[Any]) -> list[float] | None:
        """Between each mark and the next."""
        return [after - before for before, after in pairwise(marks)]

    def reuse(self, marks: list[Any]) -> None:
        """Moments cost nothing."""


class DeviceClock:
    """Moments at which the GPU came past, told by events in its stream.

    What the host does counts as far as the GPU waited for it. Nothing here waits for the GPU.
    """

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event | None:
        """None while the script records a CUDA graph: the event would become part of it."""
        if torch.cuda.is_current_stream_capturing():
            return None
        event = self._free.pop() if self._free else _event()
        event.record()
        return event

    def seconds(self, marks: list[Any]) -> list[float] | None:
        """Between each mark and the next; None while the GPU has not come past all of them."""
        if not marks[-1].query():
            return None
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]

    def reuse(self, marks: list[Any]) -> None:
        self._free += marks


class Phases:
    """Seconds by phase of each step of this rank."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._clock: HostClock | DeviceClock = DeviceClock() if on_gpu else HostClock()
        self._read_after = READ_AFTER_LAPS if on_gpu else 0
        self._exchange = Exchange(choose_rate=not on_gpu)
        self._laps: deque[list[tuple[str, Any]]] = deque()
        """Those that were not read yet, oldest first."""
        self._borders: list[tuple[str, Any]] = []
        self._now = OTHER
        self._optimizing = 0
        """How deep: torch calls the hooks of a step that calls the step of its base class twice."""
        self._evaluating = False
        self._evaluated_s = 0.0
        """Of this lap, by the host's clock."""
        self._started = time.perf_counter()
        self._enter(OTHER)

    def follow_model(self, module: nn.Module) -> None:
        """Its forward passes that need gradients, of whatever number a step, are ``forward``; what
        comes after the last of them is ``backward`` until the optimizer steps."""
        begun, ended = _Hook(self._forward_begins), _Hook(self._forward_ended)
        compiled = getattr(module, "_compiled_call_impl", None)
        if callable(compiled):
            # Compiled in place, hooks would become part of the graph.
            module._compiled_call_impl = _between(begun, compiled, ended)  # noqa: SLF001
        else:
            module.register_forward_pre_hook(begun, prepend=True)
            module.register_forward_hook(ended)
        self._exchange.follow(module)

    def follow_optimizer(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, Optimizer):
            optimizer.register_step_pre_hook(_Hook(self._optimizer_begins))
            optimizer.register_step_post_hook(_Hook(self._optimizer_ended))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time within belongs to `name`, apart from phases within."""
        before = self._now
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time within is none of the step's, and forward passes are no part of it."""
        started, self._evaluating = time.perf_counter(), True
        try:
            with self.phase(EVALUATE):
                yield
        finally:
            self._evaluating = False
            self._evaluated_s += time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """A step ends here and the next one begins: phase → seconds.

        ``step`` is the wall time of the step that ended, without ``evaluate``. The phases are its
        own too; on a GPU those of the step two before, because reading newer ones would wait for
        it, and none until there is one.
        """
        now = time.perf_counter()
        wall = now - self._started - self._evaluated_s
        self._started, self._evaluated_s = now, 0.0
        self._laps.append(self._borders)
        self._borders, self._now, self._optimizing = [], OTHER, 0
        self._enter(OTHER)
        phases = self._read()
        # Of the same step, they are its time to the last digit.
        step_s = wall if self._read_after else sum(phases.values()) - phases.get(EVALUATE, 0.0)
        return {STEP: step_s, **self._parted(phases, step_s)}

    def _parted(self, phases: dict[str, float], step_s: float) -> dict[str, float]:
        """With what the backward pass waited for other ranks as a phase of its own."""
        waited = self._exchange.exposed_s(step_s)
        if waited is not None and BACKWARD in phases:
            phases[COMM] = min(waited, phases[BACKWARD])
            phases[BACKWARD] -= phases[COMM]
        return phases

    def _enter(self, name: str) -> None:
        mark = self._clock.mark()
        if mark is not None:
            self._now = name
            self._borders.append((name, mark))

    def _read(self) -> dict[str, float]:
        """Of the newest lap that can be read."""
        found: dict[str, float] = {}
        while len(self._laps) > self._read_after:
            phases = self._summed(self._laps[0])
            if phases is None and len(self._laps) <= FORGET_AFTER_LAPS:
                break
            found = phases or found
            self._clock.reuse([mark for _, mark in self._laps.popleft()])
        return found

    def _summed(self, lap: list[tuple[str, Any]]) -> dict[str, float] | None:
        following = self._laps[1] if len(self._laps) > 1 else self._borders
        between = self._clock.seconds([*(mark for _, mark in lap), following[0][1]])
        if between is None:
            return None
        phases: dict[str, float] = {}
        for (name, _), seconds in zip(lap, between, strict=True):
            phases[name] = phases.get(name, 0.0) + seconds
        return phases

    def _forward_begins(self) -> None:
        if torch.is_grad_enabled() and not self._evaluating:
            self._enter(FORWARD)

    def _forward_ended(self) -> None:
        if self._now == FORWARD:
            self._enter(BACKWARD)

    def _optimizer_begins(self) -> None:
        self._optimizing += 1
        if self._optimizing == 1:
            self._enter(OPTIMIZER)

    def _optimizer_ended(self) -> None:
        self._optimizing = max(0, self._optimizing - 1)
        if self._optimizing == 0:
            self._enter(OTHER)


class _Hook:
    """Calls what it holds, whatever torch tells it. A copy of the model, by `copy` or `pickle`, has
    one that does nothing: it is no part of the step."""

    def __init__(self, call: Callable[[], None] | None = None) -> None:
        self._call = call

    def __call__(self, *_args: Any) -> None:
        if self._call is not None:
            self._call()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _between(begun: _Hook, call: Callable[..., Any], ended: _Hook) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        begun()
        result = call(*args, **options)
        ended()
        return result

    return called


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
