"""Handwritten digits: a small network on 1,440 images of 8 by 8 pixels, or on MNIST's 60,000."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dtp_trainer.session import Session
from dtp_trainer.tasks import idx
from dtp_trainer.tasks.cnn import cnn
from dtp_trainer.tasks.corpora import digits
from dtp_trainer.tasks.evaluation import evaluating, shares
from dtp_trainer.tasks.resnet import ResNet

Batch = tuple[Tensor, Tensor]
_TESTED = 357
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Images:
    """`pixels` (n, side, side) of 0..`white`, and `labels` (n,)."""

    pixels: Tensor
    labels: Tensor
    white: int

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], labels: NDArray[np.int64], white: int) -> Self:
        return cls(torch.tensor(pixels), torch.tensor(labels), white)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        pixels, labels = self.__getitems__([index])
        return pixels[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Pixels (batch, 1, side, side) of 0..1 and labels (batch,)."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.pixels[chosen].unsqueeze(1) / self.white, self.labels[chosen]


class Vision:
    """Classify digits."""

    tokens_per_sample: ClassVar[int] = 0

    def __init__(self, *, model: str = "cnn", data: str = "digits") -> None:
        """`model` is cnn or resnet, `data` digits or mnist."""
        self._model = model
        self.train, self.test = _mnist() if data == "mnist" else _digits()

    def model(self) -> nn.Module:
        return ResNet() if self._model == "resnet" else cnn(self.train.pixels.shape[-1])

    @property
    def flops(self) -> float:
        """Of a sample, forward and backward; the backward pass computes two products for each."""
        from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 - takes 0.1 s

        side = self.train.pixels.shape[-1]
        with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.no_grad():
            self.model().eval()(torch.empty(1, 1, side, side))
        return 3.0 * float(counted.get_total_flops())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        pixels, labels = batch
        return functional.cross_entropy(model(_shifted(pixels)), labels)

    def evaluate(self, model: nn.Module, session: Session) -> Mapping[str, float]:
        """Accuracy and loss on the test images; each rank takes its share of them."""
        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(model, session):
            for share in shares(len(self.test), session, block=_BLOCK):
                pixels, labels = (part.to(session.device) for part in self.test.__getitems__(share))
                logits = model(pixels)
                right = (logits.argmax(1) == labels).sum()
                loss = functional.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([right.double(), loss.double()]).cpu()
        accuracy, loss = (session.sum(sums) / len(self.test)).tolist()
        return {"accuracy": accuracy, "test_loss": loss}


def _digits() -> tuple[Images, Images]:
    """Nearly every fifth of the 1,797 images is kept for the test."""
    pixels, labels = digits()
    place = np.arange(len(pixels))
    tested = (place % 5 == 0) & (place < 5 * _TESTED)
    train, test = ((pixels[chosen], labels[chosen]) for chosen in (~tested, tested))
    return Images.of(*train, white=16), Images.of(*test, white=16)


def _mnist() -> tuple[Images, Images]:
    return Images.of(*idx.mnist("train"), white=255), Images.of(*idx.mnist("t10k"), white=255)


def _shifted(pixels: Tensor) -> Tensor:
    """Each image moved by up to one pixel each way, at random."""
    side = pixels.shape[-1]
    padded = functional.pad(pixels, (1, 1, 1, 1))
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)
    down, right = torch.randint(3, (2, len(pixels)), device=pixels.device)
    return windows[torch.arange(len(pixels), device=pixels.device), :, down, right]
