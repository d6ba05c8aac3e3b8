"""One rank of two: blocks of steps of each contender, interleaved in one process.

All have the same model, data, batch and optimizer, average gradients by DDP over the same process
group, and read each step's loss. ``session`` has everything on: step records and phases, the guard
against losses that are not finite, and a checkpoint now and then.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dtp_trainer.options import NonFinite, Options
from dtp_trainer.session import Session

BLOCK, WARM_BLOCKS, WIDTH, BATCH = 8, 4, 512, 512
BLOCKS = int(sys.argv[2])
EPOCHS = 1000


class Numbers:
    """Samples in one tensor, fetched a batch at a time."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, WIDTH)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return self.x[torch.as_tensor(indices)]


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = copy.deepcopy(NET)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-5)


def loaded() -> DataLoader[Tensor]:
    return DataLoader(DATA, batch_size=MINE, shuffle=True, collate_fn=lambda x: x)  # type: ignore[arg-type]


def bare() -> Iterator[float]:
    net, optimizer = made()
    model = DistributedDataParallel(net)
    while True:
        for x in loaded():
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


def with_accelerate() -> Iterator[float]:
    accelerator = Accelerator(cpu=True)
    net, plain = made()
    # The loader as it is: prepared, it would divide each rank's batches once more.
    model, optimizer = accelerator.prepare(net, plain)
    while True:
        for x in loaded():
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            yield loss.item()


def with_fabric() -> Iterator[float]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model, optimizer = fabric.setup(*made())
    while True:
        for x in loaded():
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            yield loss.item()


def with_session() -> Iterator[float]:
    batches = SESSION.batches(DATA, global_batch=BATCH, epochs=EPOCHS, collate=lambda x: x)
    for x in batches:
        loss = SESSION.optimize(lambda part: (MODEL(part) - part).square().mean(), x)
        SESSION.step(loss=loss)
        yield 0.0


torch.manual_seed(0)
NET = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
DATA = Numbers(BATCH * 64)
first, its_optimizer = made()
SESSION = Session(model=first, optimizer=its_optimizer, options=Options(non_finite=NonFinite.SKIP))
MODEL = SESSION.ddp(first)
MINE = BATCH // SESSION.world_size

CONTENDERS: dict[str, Callable[[], Iterator[float]]] = {
    "bare": bare,
    "session": with_session,
    "accelerate": with_accelerate,
    "fabric": with_fabric,
}
steps = {name: begin() for name, begin in CONTENDERS.items()}
times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
names = [*CONTENDERS]
for block in range(WARM_BLOCKS + BLOCKS):
    for name in names:
        started = time.perf_counter()
        for _ in range(BLOCK):
            next(steps[name])
        if block >= WARM_BLOCKS:
            times[name].append((time.perf_counter() - started) / BLOCK)
    names.append(names.pop(0))
if SESSION.rank == 0:
    Path(sys.argv[1]).write_text(json.dumps(times))
os._exit(0)
