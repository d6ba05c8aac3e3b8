"""A small network of residual blocks, trained as options say.

Under dtp: as `DTP_OPTIONS` say; notes step, loss and sample ids of every step; ``ASK`` as in
`learner.py`. With ``SETS``, a JSON of names and options: once with each of them, in one process
group; the losses of this rank go to ``NOTES`` as JSON. ``NOISE=0``: without dropout and batch norm,
whose outcome depends on how a batch is split.
"""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtp_trainer.options import Options
from dtp_trainer.session import Session

SAMPLES = 144
RANK = os.environ.get("RANK", "0")
NOTES = Path(os.environ["NOTES"])


class Pictures:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, 3, 6, 6, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.tensor(indices), self.x[indices]


class Block(nn.Module):
    def __init__(self, width: int, *, noise: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if noise else nn.Identity()
        self.drop = nn.Dropout(0.2) if noise else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.norm(self.conv(x))))


def network(*, noise: bool) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        *(Block(4, noise=noise) for _ in range(3)),
        nn.Flatten(),
        nn.Linear(4 * 36, 24),
        nn.ReLU(),
        nn.Linear(24, 1),
    )


def train(options: Options, *, noise: bool) -> list[float]:
    """The losses of this rank."""
    net = network(noise=noise)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    session = Session(model=net, optimizer=optimizer, options=options)
    model = session.ddp(net)
    losses: list[float] = []
    ahead = None if "PREFETCH" in os.environ else 0
    for ids, x in session.batches(Pictures(), global_batch=12, epochs=2, seed=3, ahead=ahead):
        loss = session.optimize(lambda part: loss_of(model, part), x)
        losses.append(loss.item())
        step = session.global_step + 1
        note(step, losses[-1], ids)
        if f"{RANK}:{step}" in os.environ.get("ASK", "").split():
            os.kill(os.getpid(), signal.SIGTERM)
        if f"{RANK}:{step}" in os.environ.get("DIE", "").split():
            os.kill(os.getpid(), signal.SIGKILL)
        session.step(loss=loss)
    session.finish()
    return losses


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).squeeze(1).float() - x.sum((1, 2, 3)) / 6).square().mean()


def note(step: int, loss: float, ids: Tensor) -> None:
    if "SETS" not in os.environ:
        seen = ",".join(str(int(i)) for i in ids)
        with (NOTES / f"rank{RANK}.txt").open("a") as file:
            file.write(f"{step} {loss!r} {seen}\n")


def train_with_each(sets: Mapping[str, Mapping[str, object]]) -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, values in sets.items():
        options = {key: value for key, value in values.items() if key != "noise"}
        found[name] = train(Options().replaced_by(options), noise=bool(values.get("noise", True)))
        (NOTES / f"rank{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if "SETS" in os.environ:
    train_with_each(json.loads(os.environ["SETS"]))
else:
    train(Options(), noise=os.environ.get("NOISE", "1") == "1")
