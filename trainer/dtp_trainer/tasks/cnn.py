"""A small convolutional network for grey images."""

from __future__ import annotations

from torch import nn

_CLASSES = 10


def cnn(side: int) -> nn.Module:
    """Images (n, 1, side, side), `side` at least 4 → logits (n, 10); 0.3 million parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 48, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 96, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(side // 4),
        nn.Conv2d(96, 96, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(96 * 4 * 4, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, _CLASSES),
    )
