"""Text, byte by byte: a small GPT on the King James text; loss in nats a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dtp_trainer.session import Session
from dtp_trainer.tasks import corpora

CONTEXT = 64
_VOCABULARY = 256
_WIDTH = 128
_HEADS = 4
_LAYERS = 4
_TEST_WINDOWS = 512


@dataclass(frozen=True, slots=True)
class Windows:
    """`bytes` (n,) cut into windows of `CONTEXT` + 1, each sharing its last byte with the next."""

    bytes: Tensor

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // CONTEXT

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """(batch, CONTEXT + 1), int64"""
        starts = torch.as_tensor(indices).unsqueeze(1) * CONTEXT
        return self.bytes[starts + torch.arange(CONTEXT + 1)].long()


class Language:
    """Predict the next byte. The last twentieth of the text is kept for the test."""

    name: ClassVar[str] = "language"
    tokens_per_sample: ClassVar[int] = CONTEXT

    def __init__(self) -> None:
        text = torch.from_numpy(corpora.text().copy())
        cut = len(text) - len(text) // 20
        self.train = Windows(text[:cut])
        self.test = Windows(text[cut:])

    def model(self) -> nn.Module:
        return Gpt()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return _nats(model(batch[:, :-1]), batch[:, 1:]).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, session: Session) -> Mapping[str, float]:
        """Nats a byte on windows spread over the text that is kept; each rank takes its share."""
        chosen = range(0, len(self.test), max(1, len(self.test) // _TEST_WINDOWS))
        share = chosen[session.rank :: session.world_size]
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(share), 64):
            batch = self.test.__getitems__(share[start : start + 64]).to(session.device)
            nats = _nats(model(batch[:, :-1]), batch[:, 1:])
            sums += torch.tensor([float(nats.sum()), nats.numel()], dtype=torch.float64)
        total = session.sum(sums)
        return {"test_loss": float(total[0] / total[1])}


class Gpt(nn.Module):
    """A decoder of pre-norm blocks: bytes (batch, time) → logits (batch, time, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(_VOCABULARY, _WIDTH)
        self.places = nn.Embedding(CONTEXT, _WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        self.apply(_initialise)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False)
        self.projection = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm_1(x))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out

    def _attention(self, x: Tensor) -> Tensor:
        """x (batch, time, width) → the same shape; each place sees itself and what is before it."""
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, _HEADS, width // _HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
        return projected


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    flat = logits.flatten(0, 1), target.flatten()
    nats: Tensor = functional.cross_entropy(*flat, reduction="none")
    return nats


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
