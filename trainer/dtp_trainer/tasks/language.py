"""Text, byte by byte: a small GPT on the King James text; loss in nats a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dtp_trainer.session import Session
from dtp_trainer.tasks import corpora
from dtp_trainer.tasks.evaluation import evaluating, shares
from dtp_trainer.tasks.gpt import Gpt, Size

_TESTED_BYTES = 32_768
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Windows:
    """`bytes` (n,) cut into windows of `context` + 1, each sharing its last byte with the next."""

    bytes: Tensor
    context: int

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """(batch, context + 1), int64"""
        starts = torch.as_tensor(indices, dtype=torch.int64).unsqueeze(1) * self.context
        return self.bytes[starts + torch.arange(self.context + 1)].long()


class Language:
    """Predict the next byte. The last twentieth of the text is kept for the test."""

    def __init__(self, size: Size | None = None) -> None:
        self._size = size or Size()
        self.tokens_per_sample, self.flops = self._size.context, self._size.flops
        text = torch.from_numpy(corpora.text().copy())
        cut = len(text) - len(text) // 20
        self.train = Windows(text[:cut], self._size.context)
        self.test = Windows(text[cut:], self._size.context)

    def model(self) -> nn.Module:
        return Gpt(self._size)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return _nats(model, batch).mean()

    def evaluate(self, model: nn.Module, session: Session) -> Mapping[str, float]:
        """Nats a byte on windows spread over the text that is kept; each rank takes its share."""
        count = min(max(1, _TESTED_BYTES // self._size.context), len(self.test))
        apart = len(self.test) // count
        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(model, session):
            for share in shares(count, session, block=_BLOCK):
                batch = self.test.__getitems__([apart * number for number in share])
                nats = _nats(model, batch.to(session.device))
                sums += torch.tensor([float(nats.sum()), nats.numel()], dtype=torch.float64)
        total = session.sum(sums)
        return {"test_loss": float(total[0] / total[1])}


def _nats(model: nn.Module, windows: Tensor) -> Tensor:
    """Of each byte but the first of a window, given those before it."""
    logits = model(windows[:, :-1]).flatten(0, 1)
    return functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="none")
