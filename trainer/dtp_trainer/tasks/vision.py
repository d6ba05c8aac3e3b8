"""Handwritten digits: a small convolutional network on 1,440 images of 8 by 8 pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dtp_trainer.session import Session
from dtp_trainer.tasks.corpora import digits

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Images:
    """`pixels` (n, 1, 8, 8) in 0..1 and `labels` (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.pixels[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return self.pixels[chosen], self.labels[chosen]


class Vision:
    """Classify digits. Nearly every fifth of the 1,797 images is kept for the test: 357."""

    name: ClassVar[str] = "vision"
    tokens_per_sample: ClassVar[int] = 0

    def __init__(self) -> None:
        images, labels = digits()
        pixels = torch.from_numpy(images).float().unsqueeze(1) / 16
        place = torch.arange(len(pixels))
        tested = (place % 5 == 0) & (place < 5 * 357)
        target = torch.from_numpy(labels)
        self.train = Images(pixels[~tested], target[~tested])
        self.test = Images(pixels[tested], target[tested])

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 48, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 96, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(96, 96, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(96 * 4 * 4, 128),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(128, 10),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        pixels, labels = batch
        logits: Tensor = model(_shifted(pixels))
        return functional.cross_entropy(logits, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, session: Session) -> Mapping[str, float]:
        """Accuracy and loss on the test images; each rank takes its share of them."""
        share = slice(session.rank, None, session.world_size)
        pixels = self.test.pixels[share].to(session.device)
        labels = self.test.labels[share].to(session.device)
        logits = model(pixels)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        sums = session.sum(torch.stack([right.double(), loss.double()])) / len(self.test)
        return {"accuracy": float(sums[0]), "test_loss": float(sums[1])}


def _shifted(pixels: Tensor) -> Tensor:
    """Each image moved by up to one pixel each way, at random."""
    padded = functional.pad(pixels, (1, 1, 1, 1))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)
    down, right = torch.randint(3, (2, len(pixels)), device=pixels.device)
    return windows[torch.arange(len(pixels), device=pixels.device), :, down, right]
