"""A model of blocks with tied weights and rows that divide by nothing; with dropout and batch norm,
unless ``CALM``. Each rank notes its loss and that of all ranks for every step, and says how many
elements its optimizer and its model hold. ``ASK="0:5"``: rank 0 is sent SIGTERM in step 5;
``ASK=first``: every rank in its first one.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtp_trainer.session import Session

SAMPLES, WIDTH = 60, 7
RANK = os.environ.get("RANK", "0")
NOTES = Path(os.environ["NOTES"], f"rank{RANK}.txt")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH)
        calm = bool(os.environ.get("CALM"))
        self.norm = nn.LayerNorm(WIDTH) if calm else nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.0 if calm else 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(SAMPLES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(WIDTH, SAMPLES)
        self.out.weight = self.words.weight
        self.idle = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def optimizer_of(net: Net) -> torch.optim.Optimizer:
    if os.environ.get("KIND") == "lbfgs":
        return torch.optim.LBFGS(net.parameters())
    if os.environ.get("KIND") == "adagrad":
        return torch.optim.Adagrad(net.parameters(), lr=0.05, initial_accumulator_value=0.1)
    flat = [p for p in net.parameters() if p.dim() < 2]
    rest = [(n, p) for n, p in net.named_parameters() if p.dim() >= 2]
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in rest], "weight_decay": 0.1},
        {"params": flat, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.02)


def held(tensors: Any) -> int:
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum(tensor.numel() for tensor in local if tensor.dim())


torch.manual_seed(int(os.environ.get("SEED", "7")))
net = Net()
optimizer = optimizer_of(net)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
session = Session(model=net, optimizer=optimizer, scheduler=scheduler)
ddp = session.ddp(net)
begun = session.global_step
steps = int(os.environ.get("STEPS", "15"))
for ids in session.batches(torch.arange(SAMPLES), global_batch=12, steps=steps, ahead=0):
    if os.environ.get("BY_HAND"):
        loss = nn.functional.cross_entropy(ddp(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    else:
        loss = session.optimize(lambda part: nn.functional.cross_entropy(ddp(part), part), ids)
    step = session.global_step + 1
    first = step == begun + 1 and os.environ.get("ASK") == "first"
    if first or f"{RANK}:{step}" in os.environ.get("ASK", "").split():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(os.environ.get("PACE", "0")))
    total = session.sum(loss.detach().double()) / session.world_size
    with NOTES.open("a") as file:
        file.write(f"{step} {loss.item()!r} {total.item()!r}\n")
    session.step(loss=loss)
states = held(v for state in optimizer.state.values() for v in state.values())
sys.stderr.write(f"holds {states} {held(net.parameters())}\n")
session.finish()
