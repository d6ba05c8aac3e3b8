"""A small model with dropout and batch norm that takes its steps by `session.optimize`. Each rank
notes step, loss and first weight of every step. ``BAD="1:7 0:9"``: the loss of rank 1 is NaN in
step 7. ``LEAVE_OUT="7"``: nothing is computed in step 7. ``ASK="0:5"``: SIGTERM in step 5."""

import os
import signal
from pathlib import Path

import torch
from torch import nn

from dtp_trainer.options import NonFinite, Options
from dtp_trainer.session import Session

STEPS = int(os.environ.get("STEPS", "20"))


def numbers() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(96, 8, generator=generator))


def listed(name: str) -> list[str]:
    return os.environ.get(name, "").split()


torch.manual_seed(7)
net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
options = Options(non_finite=NonFinite(os.environ.get("GUARD", "ignore")))
session = Session(model=net, optimizer=optimizer, scheduler=scheduler, options=options)
model = session.ddp(net)
notes = Path(os.environ["NOTES"], f"rank{session.rank}.txt")


def loss_of(batch: list[torch.Tensor]) -> torch.Tensor:
    (x,) = batch
    loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
    bad = f"{session.rank}:{session.global_step + 1}" in listed("BAD")
    if bad and "ONLY_THE_LOSS" in os.environ:
        return loss + float("nan")
    return loss * float("nan") if bad else loss


for batch in session.batches(numbers(), global_batch=12, steps=STEPS, seed=3, ahead=0):
    step = session.global_step + 1
    if f"{session.rank}:{step}" in listed("ASK"):
        os.kill(os.getpid(), signal.SIGTERM)
    if str(step) in listed("LEAVE_OUT"):
        loss = torch.tensor(float("nan"))
        scheduler.step()
    else:
        loss = session.optimize(loss_of, batch)
    weight = getattr(net[0].weight, "full_tensor", lambda: net[0].weight)()
    with notes.open("a") as file:
        file.write(f"{step} {loss.item()!r} {weight[0, 0].item()!r}\n")
    session.step(loss=loss)
session.finish()
