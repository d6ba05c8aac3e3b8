"""One rank of two: blocks of bare steps and of steps with `Session`, interleaved in one process."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dtp_trainer.session import Session

BLOCK, BLOCKS, WIDTH, BATCH = 8, 60, 512, 512


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


torch.manual_seed(0)
net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
session = Session(model=net, optimizer=optimizer)
model = session.ddp(net)
data = Numbers(BATCH * 64)
mine = BATCH // session.world_size


def train_step(x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def bare_block(order: Tensor) -> None:
    for number in range(BLOCK):
        train_step(data.x[order[number * mine : (number + 1) * mine]]).item()


batches = session.batches(data, global_batch=BATCH, epochs=1000, collate=lambda x: x)


def session_block() -> None:
    for _ in range(BLOCK):
        session.step(loss=train_step(next(batches)))


times: dict[str, list[float]] = {"bare": [], "session": []}
for block in range(BLOCKS + 4):
    for kind in ("bare", "session") if block % 2 else ("session", "bare"):
        started = time.perf_counter()
        if kind == "bare":
            bare_block(torch.randperm(len(data)))
        else:
            session_block()
        if block >= 4:
            times[kind].append((time.perf_counter() - started) / BLOCK)
if session.rank == 0:
    Path(sys.argv[1]).write_text(json.dumps(times))
os._exit(0)
