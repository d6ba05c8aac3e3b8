"""A trainer that keeps a snapshot by itself and goes on from it when it is started again.

torchrun --nproc-per-node 2 examples/torchrun/snapshots.py
dtp run examples/torchrun/snapshots.yaml
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Trainer:
    """Epochs of a dataset; the snapshot is written by rank 0 at the end of each."""

    def __init__(self, dataset: TensorDataset, snapshot: Path, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.device = device
        self.snapshot = snapshot
        self.sampler = DistributedSampler(dataset)
        self.loader = DataLoader(dataset, batch_size=32, sampler=self.sampler)
        torch.manual_seed(0)
        self.model = nn.Linear(20, 1).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.epochs_run = 0
        if snapshot.exists():
            self.load()
        self.ddp = DistributedDataParallel(self.model)

    def train(self, epochs: int) -> None:
        for epoch in range(self.epochs_run, epochs):
            loss = self.run_epoch(epoch)
            if self.rank == 0:
                self.save(epoch)
                print(f"epoch {epoch + 1} of {epochs}: loss {loss:.4f}", flush=True)

    def run_epoch(self, epoch: int) -> float:
        self.sampler.set_epoch(epoch)
        for inputs, targets in self.loader:
            self.optimizer.zero_grad()
            outputs = self.ddp(inputs.to(self.device))
            loss = nn.functional.mse_loss(outputs, targets.to(self.device))
            loss.backward()
            self.optimizer.step()
        return loss.item()

    def load(self) -> None:
        found = torch.load(self.snapshot, map_location=self.device, weights_only=True)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.epochs_run = found["epochs_run"]
        print(f"rank {self.rank} goes on after epoch {self.epochs_run}", flush=True)

    def save(self, epoch: int) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs_run": epoch + 1,
        }
        draft = self.snapshot.with_suffix(".draft")
        torch.save(state, draft)
        draft.replace(self.snapshot)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--snapshot", type=Path, default=Path("snapshot.pt"))
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(2048, 20, generator=generator)
    Trainer(TensorDataset(inputs, inputs.sum(1, keepdim=True)), args.snapshot, device).train(
        args.epochs
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
