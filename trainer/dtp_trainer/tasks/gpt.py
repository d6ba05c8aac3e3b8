"""A decoder of pre-norm blocks that reads bytes, after GPT-2 (Radford and others, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

_VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class Size:
    """The defaults have 0.8 million parameters."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64
    """Bytes it can look back on."""

    def __post_init__(self) -> None:
        """Raises ValueError, in one line."""
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} cannot be dealt to --heads {self.heads}")

    @property
    def flops(self) -> float:
        """Of a sample, forward and backward: 6 a byte for each weight of a product, and those of
        attention between all places."""
        weights = 12 * self.layers * self.width**2 + self.width * _VOCABULARY
        between = 12 * self.layers * self.width * self.context
        return float(self.context * (6 * weights + between))


class Gpt(nn.Module):
    """Bytes (batch, time), time at most the context → logits (batch, time, 256)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.bytes = nn.Embedding(_VOCABULARY, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, _VOCABULARY, bias=False)
        self.apply(_initialise)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width, self.heads = size.width, size.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm_1(x))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out

    def _attention(self, x: Tensor) -> Tensor:
        """x (batch, time, width) → the same shape; each place sees itself and what is before it."""
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
        return projected


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
