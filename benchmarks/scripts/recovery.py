"""Steps of 5 ms with a checkpoint every 50; each rank notes step, pid, time and world size.

Under dtp it uses `Session`; under torchrun the usual hand-written load and save.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

RANK, WORLD = int(os.environ["RANK"]), os.environ["WORLD_SIZE"]
SAVED = Path(os.environ["BENCH_FILE"]).with_suffix(".pt")
NOTES = Path(f"{os.environ['BENCH_FILE']}.{RANK}")
torch.manual_seed(0)
net = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)


def train(model: torch.nn.Module, step: int) -> Tensor:
    loss: Tensor = model(torch.randn(16, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(0.005)
    with NOTES.open("a") as notes:
        notes.write(f"{step} {os.getpid()} {time.time()} {WORLD}\n")
    return loss


def under_dtp() -> None:
    from dtp_trainer.session import Session

    session = Session(model=net, optimizer=optimizer)
    model = session.ddp(net)
    while True:
        session.step(loss=train(model, session.global_step + 1))


def under_torchrun() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    step = 0
    if SAVED.exists():
        saved = torch.load(SAVED)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    model = DistributedDataParallel(net)
    while True:
        step += 1
        train(model, step)
        if step % 50 == 0 and RANK == 0:
            state = {
                "model": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            torch.save(state, SAVED.with_suffix(".tmp"))
            SAVED.with_suffix(".tmp").rename(SAVED)


if "DTP_GENERATION" in os.environ:
    under_dtp()
else:
    under_torchrun()
