"""A small model with dropout, batch norm, a schedule and an average of its weights. Each rank notes
step, loss, average and sample ids of every step. ``ASK="0:5 1:start"``: rank 0 is sent SIGTERM in
step 5, rank 1 before its first."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from dtp_trainer.session import Session

SAMPLES, FEATURES = 144, 8
RANK = os.environ.get("RANK", "0")


class Numbers:
    """Rows with noise from the global generator."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.x[index] + 0.1 * torch.randn(FEATURES)


class Average:
    def __init__(self) -> None:
        self.value = torch.zeros(())

    def update(self, weight: torch.Tensor) -> None:
        self.value = 0.9 * self.value + 0.1 * weight.detach().mean()

    def state_dict(self) -> dict[str, torch.Tensor]:
        odd = {"odd": object()} if "ODD" in os.environ else {}
        return {"value": self.value, **odd}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.value = state["value"]


def maybe_ask(moment: object) -> None:
    if f"{RANK}:{moment}" in os.environ.get("ASK", "").split():
        os.kill(os.getpid(), signal.SIGTERM)


torch.manual_seed(7)
net = nn.Sequential(
    nn.Linear(FEATURES, int(os.environ.get("WIDTH", "16"))),
    nn.LazyBatchNorm1d(),
    nn.Dropout(0.3),
    nn.LazyLinear(1),
)
net(torch.zeros(2, FEATURES))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
average = Average()
session = Session(model=net, optimizer=optimizer, scheduler=scheduler, state={"average": average})
maybe_ask("start")
if os.environ.get("DEAF") == RANK:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
model = session.ddp(net)
notes = Path(os.environ["NOTES"], f"rank{session.rank}.txt")
batch = int(os.environ.get("BATCH", "12"))
for ids, x in session.batches(Numbers(), global_batch=batch, epochs=2, seed=3, ahead=0):
    loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    average.update(net[0].weight)
    step = session.global_step + 1
    maybe_ask(step)
    time.sleep(float(os.environ.get("PACE", "0")))
    seen = ",".join(str(int(i)) for i in ids)
    with notes.open("a") as file:
        file.write(f"{step} {loss.item()!r} {average.value.item()!r} {seen}\n")
    session.step(loss=loss if step != 3 else float("nan"), lr=scheduler.get_last_lr()[0])
session.log(final=1.0)
session.finish()
sys.stdout.write("finished\n")
