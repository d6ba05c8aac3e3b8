"""What a rank tells: a `wire.Step` a step in its step file, and warnings of one line on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from dtp_trainer.wire import Env, Step, encode_step

Value: TypeAlias = float | Tensor
"""A number, or a tensor with one element."""

READ_DEVICE_EVERY_S = 0.1


def say(text: str) -> None:
    """One line for people on stderr, marked as ours."""
    sys.stderr.write(f"dtp: {text}\n")
    sys.stderr.flush()


class _Saying(logging.Handler):
    """Warnings of this package, as `say` says them."""

    def emit(self, record: logging.LogRecord) -> None:
        say(" ".join(record.getMessage().split()))


def say_warnings() -> None:
    """From now on, whatever the script does with its own logging."""
    ours = logging.getLogger("dtp_trainer")
    ours.handlers = [_Saying(logging.WARNING)]
    ours.propagate = False


@dataclass(frozen=True, slots=True)
class Position:
    """Where the job stands after a step."""

    step: int
    """Completed since the job began, over all attempts."""
    epoch: float
    total_steps: int | None
    samples: int
    """Of the global batch."""
    tokens: int | None = None


class Telemetry:
    """Step records of one rank. Nothing is written where nobody asked for it; a full disk costs the
    records of its time, never the training."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._generation = int(os.environ.get(Env.GENERATION, "0"))
        self._file = _open(os.environ.get(Env.STEPS_FILE))
        self._torn = False
        """The newest record could not be written, or not wholly."""
        self._read_device_at = 0.0
        self._kept: dict[str, float] = {}
        self._last: Position | None = None
        self.values: Mapping[str, float] = {}
        """The newest number of each name, those of the step under way included."""

    def keep(self, values: Mapping[str, Value]) -> None:
        """To be reported with the next step."""
        numbers = {name: _number(name, value) for name, value in values.items()}
        self._kept |= numbers
        self.values = {**self.values, **numbers}

    def sample(self, values: Mapping[str, Value]) -> None:
        """As `keep`, but reading a tensor waits for its device: one on a GPU is read ten times a
        second at most."""
        now = time.perf_counter()
        skip = now - self._read_device_at < READ_DEVICE_EVERY_S
        if not skip:
            self._read_device_at = now
        self.keep(
            {
                name: value
                for name, value in values.items()
                if not (skip and isinstance(value, Tensor) and value.is_cuda)
            }
        )

    def step(self, position: Position, seconds: Mapping[str, float]) -> None:
        """Report a step with the values kept since the one before."""
        self._write(position, self._kept, seconds)
        self._kept, self._last = {}, position

    def close(self) -> None:
        """Values that no step carried any more go out in a record of the last step, without
        seconds."""
        if self._kept and self._last is not None:
            self.step(self._last, {})
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(
        self, position: Position, values: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        if self._file is None:
            return
        record = Step(
            at=time.time(),
            generation=self._generation,
            rank=self._rank,
            world_size=self._world_size,
            step=position.step,
            epoch=position.epoch,
            total_steps=position.total_steps,
            samples=position.samples,
            tokens=position.tokens,
            values=values,
            seconds=seconds,
        )
        line = encode_step(record).encode()
        try:
            # After a failure the file may end in half a line.
            self._file.write(b"\n" + line if self._torn else line)
        except OSError as error:
            if not self._torn:
                why = error.strerror or error
                say(f"steps of rank {self._rank} are not reported while this lasts: {why}")
            self._torn = True
        else:
            self._torn = False


def _number(name: str, value: Value) -> float:
    try:
        return float(value.item() if isinstance(value, Tensor) else value)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(
            f"{name}={value!r} is neither a number nor a tensor of one element"
        ) from None


def _open(path: str | None) -> FileIO | None:
    if not path:
        return None
    try:
        return Path(path).open("ab", buffering=0)
    except OSError as error:
        say(f"no metrics: cannot write {path}: {error.strerror or error}")
        return None
