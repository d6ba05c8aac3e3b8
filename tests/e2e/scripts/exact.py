"""A small model with dropout; each rank notes what it saw of every step: step, loss, sample ids.
A job with `training` options leaves the whole step to `optimize`."""

import os
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dtp_trainer.options import Options
from dtp_trainer.session import Session


class Numbers(Dataset[tuple[int, torch.Tensor]]):
    def __init__(self) -> None:
        self.x = torch.randn(480, 16, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.x[index]


torch.manual_seed(7)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
session = Session(model=net, optimizer=optimizer)
model = session.ddp(net)
notes = (Path(os.environ["NOTES"]) / f"rank{session.rank}.txt").open("a", buffering=1)


def loss_of(x: torch.Tensor) -> torch.Tensor:
    return (model(x).squeeze(1).float() - x.sum(1)).square().mean()


def step_by_hand(x: torch.Tensor) -> torch.Tensor:
    loss = loss_of(x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


for ids, x in session.batches(Numbers(), global_batch=24, epochs=int(os.environ["EPOCHS"]), seed=3):
    loss = session.optimize(loss_of, x) if session.options != Options() else step_by_hand(x)
    seen = " ".join(str(int(i)) for i in ids)
    notes.write(f"{session.global_step + 1} {loss.item()!r} {seen}\n")
    time.sleep(float(os.environ["PACE"]))
    session.step(loss=loss)
session.finish()
