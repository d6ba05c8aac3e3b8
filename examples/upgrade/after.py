"""A loop of one's own, which draws its batches by the number of the step."""

import argparse
import os

import torch
from torch import nn

from dtp_trainer.session import Session


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    rank = int(os.environ["RANK"])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    session = Session(model=model, optimizer=optimizer)
    ddp = session.ddp(model)
    for step in range(session.global_step, args.steps):
        inputs, targets = batch(step, rank)
        loss = nn.functional.mse_loss(ddp(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"rank {rank}: step {step + 1}: loss {loss.item():.6f}", flush=True)
        session.step(loss=loss)
    session.finish()


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(64, 8, generator=generator)
    return inputs, inputs.square().sum(1, keepdim=True) / 8


if __name__ == "__main__":
    main()
