"""A script that knows nothing of dtp and runs under torchrun."""

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print("world", int(total), flush=True)
dist.destroy_process_group()
