"""Profiler windows on command, in a rank that goes on training.

The agent leaves a wish (`inspection.Ask`) in the file named by ``DTP_ASK_FILE``. It is found at the
end of a step; the steps after it are recorded by torch's profiler, each under a mark
``ProfilerStep#124``, and written to the job's storage by a thread while training goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dtp_trainer.inspection import Ask, Operator, Profiled, answer_key, recorded_key
from dtp_trainer.storage import Storage, StorageError, open_storage
from dtp_trainer.wire import Env

LOOK_EVERY_S = 0.25
OPERATORS = 15
_HISTORY = 200_000
"""Allocations and frees that a memory snapshot of a GPU goes back."""
_MARK = "ProfilerStep#"


class Profiling:
    """The wishes of one rank. No failure of it is one of the training."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._path = os.environ.get(Env.ASK_FILE, "")
        self._looked_at = 0.0
        self._ask: Ask | None = None
        self._window: _Window | None = None
        self._writing: threading.Thread | None = None

    def end_of_step(self, step: int) -> None:
        """After each step; costs one comparison of clocks when nothing is asked."""
        if self._window is not None:
            self._advance(self._window, step)
        elif self._path:
            self._look()
            if self._ask is not None and step + 1 >= self._ask.not_before:
                self._begin(self._ask, step + 1)

    def close(self) -> None:
        """What was recorded so far is written; returns when it is."""
        if self._window is not None:
            self._finish(self._window)
        if self._writing is not None:
            self._writing.join()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        with contextlib.suppress(OSError, ValueError, TypeError):
            path = Path(self._path)
            self._ask = Ask.from_dict(json.loads(path.read_bytes()))
            path.unlink()

    def _begin(self, ask: Ask, step: int) -> None:
        self._ask = None
        if self._writing is not None:
            self._writing.join()
        if torch._C._autograd._profiler_enabled():  # noqa: SLF001 - ours would end it
            why = "the script's own profiler runs"
            self._answer(Profiled(ask.id, self._rank, error=why))
            return
        try:
            self._window = _Window(ask, self._rank, step)
        except Exception as error:  # noqa: BLE001 - whatever torch's profiler has
            self._answer(Profiled(ask.id, self._rank, error=_one_line(error)))

    def _advance(self, window: _Window, step: int) -> None:
        try:
            over = window.step_ended(step)
        except Exception as error:  # noqa: BLE001 - as above
            self._window = None
            self._answer(Profiled(window.ask.id, self._rank, error=_one_line(error)))
            return
        if over:
            self._finish(window)

    def _finish(self, window: _Window) -> None:
        self._window = None
        try:
            window.stop()
        except Exception as error:  # noqa: BLE001 - as above
            self._answer(Profiled(window.ask.id, self._rank, error=_one_line(error)))
            return
        self._writing = threading.Thread(
            target=self._write, args=(window,), name="dtp-profile", daemon=True
        )
        self._writing.start()

    def _write(self, window: _Window) -> None:
        """In its thread."""
        try:
            self._answer(window.written_to(_storage()))
        except Exception as error:  # noqa: BLE001 - as above
            self._answer(Profiled(window.ask.id, self._rank, error=_one_line(error)))

    def _answer(self, answer: Profiled) -> None:
        data = json.dumps(answer.to_dict()).encode()
        with contextlib.suppress(StorageError):  # then who asked is told that nothing came
            _storage().write(answer_key(answer.id, answer.rank), data)


class _Window:
    """Some consecutive steps under the profiler. Any method may raise what torch raises."""

    def __init__(self, ask: Ask, rank: int, step: int) -> None:
        self.ask = ask
        self._rank, self._first, self._last = rank, step, step - 1
        self._snapshot: dict[str, Any] | None = None
        cuda = torch.cuda.is_available()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop are no news
        self._records_cuda_memory = ask.memory and cuda
        self._profile = profile(
            activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else []),
            record_shapes=True,
            profile_memory=ask.memory,
        )
        if self._records_cuda_memory:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)  # noqa: SLF001
        self._profile.start()
        self._mark = self._marked(step)

    def step_ended(self, step: int) -> bool:
        """Whether it was the last one."""
        self._mark.__exit__(None, None, None)
        self._last = step
        if step - self._first + 1 >= self.ask.steps:
            return True
        self._mark = self._marked(step + 1)
        return False

    def stop(self) -> None:
        """Waits for the device, so that its part of the last step is in it."""
        if self._records_cuda_memory:
            self._snapshot = torch.cuda.memory._snapshot()  # noqa: SLF001
            torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001
        self._profile.stop()

    def written_to(self, storage: Storage) -> Profiled:
        """What was recorded, in `storage`."""
        if self._last < self._first:
            return Profiled(self.ask.id, self._rank, error="it ended before the next step did")
        return Profiled(
            id=self.ask.id,
            rank=self._rank,
            first_step=self._first,
            last_step=self._last,
            files=tuple(self._write_files(storage)),
            operators=self._operators(),
        )

    def _marked(self, step: int) -> Any:
        mark = record_function(f"{_MARK}{step}")
        mark.__enter__()  # type: ignore[no-untyped-call]
        return mark

    def _write_files(self, storage: Storage) -> list[str]:
        keys = [self._key("trace.json.gz")]
        with tempfile.TemporaryDirectory(prefix="dtp-profile-") as folder:
            trace = Path(folder, "trace.json.gz")
            self._profile.export_chrome_trace(str(trace))
            storage.write(keys[0], trace.read_bytes())
        if self.ask.memory:
            keys.append(self._key("memory.txt"))
            storage.write(keys[-1], self._memory_summary().encode())
        if self._snapshot is not None:
            keys.append(self._key("memory.pickle"))
            storage.write(keys[-1], pickle.dumps(self._snapshot))
        return keys

    def _key(self, what: str) -> str:
        return recorded_key(self._first, self._rank, what)

    def _memory_summary(self) -> str:
        averages = self._profile.key_averages(group_by_input_shape=True)
        table: str = averages.table(
            sort_by="self_cpu_memory_usage", row_limit=50, max_name_column_width=60
        )
        head = f"rank {self._rank}, steps {self._first} to {self._last}\n"
        device = torch.cuda.memory_summary() if self._records_cuda_memory else ""
        return f"{head}\n{device}\n{table}"

    def _operators(self) -> tuple[Operator, ...]:
        found = [
            Operator(
                name=event.key,
                calls=event.count,
                own_ms=round(event.self_cpu_time_total / 1000, 3),
                total_ms=round(event.cpu_time_total / 1000, 3),
                gpu_ms=round(event.self_device_time_total / 1000, 3),
                own_bytes=max(event.self_cpu_memory_usage, event.self_device_memory_usage),
            )
            for event in self._profile.key_averages()
            if not event.key.startswith("ProfilerStep")
        ]
        return tuple(sorted(found, key=self._weight, reverse=True)[:OPERATORS])

    def _weight(self, operator: Operator) -> tuple[float, float]:
        if self.ask.memory:
            return float(operator.own_bytes), operator.own_ms
        return operator.gpu_ms, operator.own_ms


def _storage() -> Storage:
    """Of the job. Raises `StorageError`."""
    return open_storage(os.environ.get(Env.STORAGE, ""))


def _one_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"[:300]
