"""A small residual network with batch norm, after He and others (2015)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

_CLASSES = 10
_WIDTHS = (32, 64, 128)


class ResNet(nn.Module):
    """Images (n, 1, side, side) → logits (n, 10): two blocks a width, the side halved between
    widths; 0.7 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        first = _WIDTHS[0]
        self.stem = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        steps = zip((first, *_WIDTHS), _WIDTHS, strict=False)
        stages = [(Block(old, new), Block(new, new)) for old, new in steps]
        self.blocks = nn.Sequential(*(block for stage in stages for block in stage))
        self.head = nn.Linear(_WIDTHS[-1], _CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.blocks(self.stem(pixels)).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


class Block(nn.Module):
    """Two convolutions beside a shortcut; with more widths out than in, at half the side."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = 1 if width == width_in else 2
        self.first = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if width != width_in:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.norm_1(self.first(x)))
        return functional.relu(self.norm_2(self.second(inner)) + self.shortcut(x))
