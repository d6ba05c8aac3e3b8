"""One rank of `benchmarks.checkpoint`: steps of about 15 ms, and what saving a large state costs.

``stall.py save FOLDER GIGABYTES ROUNDS`` and ``stall.py restore FOLDER GIGABYTES ROUNDS``, with
torchrun's environment. Rank 0 prints one JSON object: contender → list of measurements.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dtp_trainer.checkpoints.checkpoint import Checkpointer, Outcome, StateBundle, load
from dtp_trainer.checkpoints.heads import Retention, read_head
from dtp_trainer.storage import FileStorage

STEP_S = 0.015
CALM_STEPS = 24
SETTLE_STEPS = 6
LAYER = 1024


class Contender(Protocol):
    def save(self, step: int) -> None:
        """Returns when training may go on."""

    def durable(self) -> bool:
        """What was saved last would survive the machine's end; asked on rank 0."""

    def close(self) -> None: ...


def state_of(gigabytes: float) -> dict[str, Any]:
    """A model and the two moments of Adam, as tensors of 4 MB."""
    layers = max(1, round(gigabytes * 1e9 / 3 / (LAYER * LAYER * 4)))
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {f"layer{n}.{kind}": torch.randn(LAYER, LAYER) for n in range(layers) for kind in kinds}


class TorchSave:
    """As careful scripts do it: rank 0, a temporary file, fsync, rename."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self._target, self._state = folder / "torch.pt", state

    def save(self, step: int) -> None:
        if dist.get_rank():
            return
        draft = self._target.with_suffix(".tmp")
        with draft.open("wb") as file:
            torch.save(self._state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self._target)

    def durable(self) -> bool:
        return True

    def close(self) -> None:
        pass


class Dcp:
    """torch.distributed.checkpoint: `wanted` saves; each into a folder of its own."""

    def __init__(self, folder: Path, state: dict[str, Any], group: Any) -> None:
        self._folder, self._state, self._group = folder / "dcp", state, group

    def target(self, step: int) -> Path:
        if dist.get_rank() == 0:  # two at a time on the disk, as with everybody
            for old in sorted(self._folder.glob("*"))[:-1]:
                shutil.rmtree(old)
        return self._folder / f"{step:06d}"

    def save(self, step: int) -> None:
        dcp.save(self._state, checkpoint_id=self.target(step))

    def durable(self) -> bool:
        return True

    def close(self) -> None:
        pass


class DcpAsync(Dcp):
    """In the background; with `stager`, its buffers are used again."""

    def __init__(
        self, folder: Path, state: dict[str, Any], group: Any, stager: DefaultStager | None
    ) -> None:
        super().__init__(folder, state, group)
        self._stager = stager
        self._saving: Future[Any] | None = None

    def save(self, step: int) -> None:
        if self._saving is not None:
            self._saving.result()
        found = dcp.async_save(
            self._state,
            checkpoint_id=self.target(step),
            process_group=self._group,
            async_stager=self._stager,
        )
        self._saving = found if isinstance(found, Future) else found.upload_completion

    def durable(self) -> bool:
        return self._saving is None or self._saving.done()

    def close(self) -> None:
        if self._saving is not None:
            self._saving.result()
        if self._stager is not None:
            self._stager.close()


class Ours:
    """dtp, with every byte hashed."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self._bundle = StateBundle({"model": state})
        self._saver = Checkpointer(
            FileStorage(folder / "dtp"),
            generation=1,
            attempt=1,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            policy=Retention(keep=2),
            on_report=self._reported,
        )
        self._saver.prepare(self._bundle)
        self._done = True

    def save(self, step: int) -> None:
        self._done = False
        self._saver.save(self._bundle, step=step, epoch=0.0, values={}, data_state={})

    def durable(self) -> bool:
        return self._done

    def close(self) -> None:
        self._saver.close()

    def _reported(self, report: Any) -> None:
        assert report.outcome in (Outcome.COMMITTED, Outcome.WRITTEN), report
        self._done = True


class Training:
    """Small steps, in which all ranks average a gradient and learn whether rank 0 goes on."""

    def __init__(self) -> None:
        self._model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
        self._ddp = nn.parallel.DistributedDataParallel(self._model)
        self._x = torch.randn(64, 256)
        self._passes = 1
        one = statistics.median(self.step() for _ in range(20))
        passes = torch.tensor(max(1, round(STEP_S / one)))
        dist.broadcast(passes, 0)
        self._passes = int(passes)

    def step(self, over: Callable[[], bool] = lambda: False) -> float:
        """Its seconds; `self.over` is what rank 0 answered."""
        began = time.perf_counter()
        with self._ddp.no_sync():
            for _ in range(self._passes - 1):
                self._ddp(self._x).sum().backward()
        self._ddp(self._x).sum().backward()
        self._model.zero_grad()
        flag = torch.tensor(int(over()))
        dist.broadcast(flag, 0)
        self.over = bool(flag)
        return time.perf_counter() - began

    def cost(self, contender: Contender, step: int) -> dict[str, float]:
        """Of one save, with the steps beside it."""
        dist.barrier()
        calm = statistics.median(self.step() for _ in range(CALM_STEPS))
        began = time.perf_counter()
        contender.save(step)
        blocked = time.perf_counter() - began
        lost = blocked
        while True:  # until rank 0 says so: all ranks take the same steps
            lost += self.step(contender.durable) - calm
            if self.over:
                break
        durable = time.perf_counter() - began
        return {"blocked_s": blocked, "lost_s": lost, "durable_s": durable, "step_s": calm}


def saves(folder: Path, gigabytes: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Interleaved, after one round that nobody counts."""
    state = state_of(gigabytes)
    group = dist.new_group(backend="gloo")
    stager = DefaultStager(StagingOptions(False, False, False, False))  # noqa: FBT003 - theirs
    contenders: dict[str, Contender] = {
        "torch.save": TorchSave(folder, state),
        "dcp.save": Dcp(folder, state, group),
        "dcp.async_save": DcpAsync(folder, state, group, None),
        "dcp.async_save, reused stager": DcpAsync(folder, state, group, stager),
        "dtp": Ours(folder, state),
    }
    training = Training()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            cost = training.cost(contender, number)
            if number:
                found[name].append(cost)
            for _ in range(SETTLE_STEPS):
                training.step()
    for contender in contenders.values():
        contender.close()
    return found


def restores(folder: Path, gigabytes: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Every rank has the whole state; the slowest one counts."""
    state = state_of(gigabytes)
    storage = FileStorage(folder / "dtp")
    newest = read_head(storage).entries[-1].name
    [*_, of_dcp] = sorted((folder / "dcp").glob("*"))
    rank, world = dist.get_rank(), dist.get_world_size()
    contenders: dict[str, Callable[[], object]] = {
        "torch.load": lambda: torch.load(folder / "torch.pt", weights_only=True),
        "dcp.load": lambda: dcp.load(state, checkpoint_id=of_dcp),
        "dtp": lambda: load(storage, newest, rank=rank, world_size=world),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, restore in contenders.items():
            dist.barrier()
            began = time.perf_counter()
            restore()
            dist.barrier()
            if number:
                found[name].append({"seconds": time.perf_counter() - began})
    return found


def main() -> None:
    what, folder, gigabytes, rounds = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measure = {"save": saves, "restore": restores}[what]
    found = measure(Path(folder), float(gigabytes), int(rounds))
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    with contextlib.suppress(Exception):
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
