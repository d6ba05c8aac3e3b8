"""The first thing that people write: a toy model in DistributedDataParallel, saved by rank 0 and
loaded by all.

torchrun --nproc-per-node 2 examples/torchrun/basic.py
dtp run examples/torchrun/basic.yaml
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    print(f"rank {rank} of {dist.get_world_size()} on {device}", flush=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 5)).to(device)
    ddp = DistributedDataParallel(model, device_ids=[local_rank] if cuda else None)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    train(ddp, optimizer, device)

    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    checkpoint = Path(tempfile.gettempdir(), f"basic-{job}.pt")
    if rank == 0:
        torch.save(ddp.state_dict(), checkpoint)
    dist.barrier()  # nobody reads before it is written
    ddp.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True))
    loss = train(ddp, optimizer, device)
    dist.barrier()  # nobody removes it before all have read
    if rank == 0:
        checkpoint.unlink()
        print(f"loss {loss:.4f}", flush=True)
    dist.destroy_process_group()


def train(ddp: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Twenty steps on one batch; the last loss."""
    torch.manual_seed(dist.get_rank())
    inputs, targets = torch.randn(20, 10, device=device), torch.randn(20, 5, device=device)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(ddp(inputs), targets)
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    main()
