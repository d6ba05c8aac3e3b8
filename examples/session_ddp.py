"""Handwritten digits with DistributedDataParallel: `plain_ddp.py` with a Session.

dtp run examples/session_ddp.yaml, or: torchrun --nproc-per-node 2 examples/session_ddp.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from dtp_trainer.session import Session


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=48, help="of all processes together")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    session = Session(model=model, optimizer=optimizer)
    ddp = session.ddp(model)

    def loss_of(batch: list[torch.Tensor]) -> torch.Tensor:
        pixels, labels = batch
        return nn.functional.cross_entropy(ddp(pixels), labels)

    for batch in session.batches(digits(), global_batch=args.batch_size, epochs=args.epochs):
        session.step(loss=session.optimize(loss_of, batch))
    session.finish()


def digits() -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))


if __name__ == "__main__":
    main()
