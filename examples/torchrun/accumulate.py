"""Gradients accumulated over several batches, without an all-reduce but for the last, and an
optimizer whose state is dealt over the ranks.

torchrun --nproc-per-node 2 examples/torchrun/accumulate.py
dtp run examples/torchrun/accumulate.yaml
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

PARTS = 4


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(device)
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), optimizer_class=torch.optim.Adam, lr=1e-2)

    generator = torch.Generator().manual_seed(dist.get_rank())
    first = last = 0.0
    for step in range(20):
        optimizer.zero_grad()
        for part in range(PARTS):
            inputs = torch.randn(16, 64, generator=generator).to(device)
            waits = part < PARTS - 1
            with ddp.no_sync() if waits else contextlib.nullcontext():
                loss = nn.functional.mse_loss(ddp(inputs), inputs) / PARTS
                loss.backward()
        optimizer.step()
        last = loss.item() * PARTS
        first = first or last
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {last:.4f}", flush=True)

    alike(model)
    assert last < first, (first, last)
    dist.destroy_process_group()


def alike(model: nn.Module) -> None:
    """Every rank holds the same weights."""
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    theirs = mine.clone()
    dist.broadcast(theirs, src=0)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


if __name__ == "__main__":
    main()
