"""A small GPT on random bytes: so many samples a rank and step; rank 0 writes samples a second of
the whole job. With ``session`` by `Session`, else by bare DDP."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dtp_trainer.options import NonFinite, Options
from dtp_trainer.session import Session
from dtp_trainer.tasks.gpt import Gpt, Size

WARM, STEPS, BATCH, SIZE = 10, 60, 16, Size(layers=4, width=192, heads=6, context=64)


class Bytes:
    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return torch.randint(0, 256, (len(indices), SIZE.context + 1))


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    logits = model(text[:, :-1]).flatten(0, 1)
    return functional.cross_entropy(logits, text[:, 1:].flatten())


def bare() -> Iterator[int]:
    """Each step, and how many ranks took it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    net = Gpt(SIZE)
    model = DistributedDataParallel(net) if size > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    data = Bytes()
    while True:
        loss = loss_of(model, data.__getitems__(range(BATCH)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        yield size


def with_session() -> Iterator[int]:
    net = Gpt(SIZE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    session = Session(model=net, optimizer=optimizer, options=Options(non_finite=NonFinite.SKIP))
    model, size = session.ddp(net), session.world_size
    batches = session.batches(
        Bytes(), global_batch=BATCH * size, steps=WARM + STEPS, collate=lambda x: x
    )
    for text in batches:
        loss = session.optimize(lambda part: loss_of(model, part), text)
        session.step(loss=loss)
        yield size
    session.finish()


started = 0.0
for number, ranks in enumerate(with_session() if sys.argv[1] == "session" else bare(), start=1):
    if number == WARM:
        started = time.perf_counter()
    if number == WARM + STEPS:
        speed = STEPS * BATCH * ranks / (time.perf_counter() - started)
        if os.environ.get("RANK", "0") == "0":
            Path(os.environ["BENCH_FILE"]).write_text(str(speed))
        break
