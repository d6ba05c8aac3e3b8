"""A plain DDP script that knows nothing of dtp: 50 small steps; notes the time of its first step
in BENCH_FILE."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(
    torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(50):
    loss = model(torch.randn(16, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0 and dist.get_rank() == 0:
        Path(os.environ["BENCH_FILE"]).write_text(str(time.time()))
dist.barrier()
del model
dist.destroy_process_group()
