"""What an evaluation needs: this rank's part of the samples, and when to stop for lack of gain."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dtp_trainer.session import Session


def shares(count: int, session: Session, *, block: int) -> Iterator[list[int]]:
    """This rank's samples of `count`, at most `block` at once. The same number of lists on every
    rank (the last may be empty), as sharded models and running statistics are exchanged in each
    forward pass."""
    together = block * session.world_size
    for start in range(0, count, together):
        yield list(range(start, min(start + together, count)))[session.rank :: session.world_size]


@contextlib.contextmanager
def evaluating(model: nn.Module, session: Session) -> Iterator[None]:
    """Without gradients, dropout, new running statistics, and without counting as the step's."""
    model.eval()
    with session.evaluating(), torch.no_grad():
        yield
    model.train()


class Patience:
    """Ends a training whose measure, less being better, has not fallen for some evaluations.

    Its state belongs into the checkpoint. Ranks agree as they see the same measures.
    """

    def __init__(self, evaluations: int | None) -> None:
        """None: endless."""
        self._evaluations = evaluations
        self._best, self._in_vain = math.inf, 0

    @property
    def lost(self) -> bool:
        return self._evaluations is not None and self._in_vain >= self._evaluations

    def saw(self, measure: float) -> None:
        """NaN is no gain."""
        better = measure < self._best
        self._in_vain = 0 if better else self._in_vain + 1
        self._best = measure if better else self._best

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "in_vain": self._in_vain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._in_vain = float(state["best"]), int(state["in_vain"])
