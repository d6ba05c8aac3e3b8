"""Gradients travel as low-rank factors: PowerSGD (Vogels and others, 2019) with error feedback.

The library's own hook starts collectives from callbacks; on gloo their order differs from rank to
rank as soon as there are two buckets, and the job dies. Its state goes by bucket and is lost with
the process. Here the state goes by parameter, and all of it is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

WARM_UP_STEPS = 10
"""Early gradients change too fast for the factors of the step before to fit them."""
WORTH = 2
"""A gradient is compressed when that makes it at least this many times smaller."""


@dataclass(slots=True)
class _Factor:
    right: Tensor
    """m by rank, the same on all ranks: where the next gradient is expected to lie."""
    error: Tensor
    """n by m, of this rank alone: what compression left out so far, added to the next gradient."""


class PowerSGD:
    """A communication hook of DDP, and the state that it needs of step after step."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        """`rank`: of the factors; at most as many numbers of a side are sent."""
        self.steps = 0
        self._names: dict[int, str] = {}
        self._factors: dict[str, _Factor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and _worth_it(parameter, rank):
                self._names[id(parameter)] = name
                self._factors[name] = _first(parameter, rank, seed=len(self._factors))

    def hook(self, group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
        """Collectives are begun here and nowhere later, so that all ranks have one order."""
        buffer = bucket.buffer()
        if self.steps < WARM_UP_STEPS:
            dist.all_reduce(buffer.div_(group.size()), group=group)
        else:
            self._reduce(bucket, group)
        if bucket.is_last():
            self.steps += 1
        return _done(buffer)

    def _reduce(self, bucket: GradBucket, group: dist.ProcessGroup) -> None:
        plain: list[Tensor] = []
        compressed: list[tuple[_Factor, Tensor]] = []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self._names.get(id(parameter))
            if name is None:
                plain.append(gradient)
            else:
                compressed.append((self._factors[name], gradient))
        _average(plain, group)
        _average_compressed(compressed, group)

    def state_dict(self) -> dict[str, Any]:
        """The same on all ranks."""
        return {"steps": self.steps, "right": {n: f.right for n, f in self._factors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Errors begin at nothing; those of a rank come from `Errors`."""
        self.steps = state["steps"]
        for name, factor in self._factors.items():
            factor.right.copy_(state["right"][name])
            factor.error.zero_()

    def errors(self) -> dict[str, Tensor]:
        """Of this rank, by parameter."""
        return {name: factor.error for name, factor in self._factors.items()}


class Errors:
    """What compression left out on this rank; lost when the number of ranks changes."""

    def __init__(self, of: PowerSGD) -> None:
        self._of = of

    def state_dict(self) -> dict[str, Any]:
        return dict(self._of.errors())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, error in self._of.errors().items():
            error.copy_(state[name])


def _worth_it(parameter: Tensor, rank: int) -> bool:
    if parameter.dim() < 2 or parameter.numel() == 0:
        return False
    rows, columns = len(parameter), parameter.numel() // len(parameter)
    return (rows + columns) * min(rank, rows, columns) * WORTH < rows * columns


def _first(parameter: Tensor, rank: int, *, seed: int) -> _Factor:
    rows, columns = len(parameter), parameter.numel() // len(parameter)
    generator = torch.Generator().manual_seed(seed)  # the same on all ranks, and nobody else's
    right = torch.randn(columns, min(rank, rows, columns), generator=generator)
    error = torch.zeros(rows, columns, device=parameter.device)
    return _Factor(right.to(parameter.device), error)


def _average_compressed(parts: Sequence[tuple[_Factor, Tensor]], group: dist.ProcessGroup) -> None:
    """One step of the power method for each gradient, from where the last one ended."""
    matrices = [g.float().reshape(f.error.shape) + f.error for f, g in parts]
    lefts = [matrix @ f.right for matrix, (f, _) in zip(matrices, parts, strict=True)]
    _average(lefts, group)
    lefts = [torch.linalg.qr(left).Q for left in lefts]
    rights = [matrix.T @ left for matrix, left in zip(matrices, lefts, strict=True)]
    _average(rights, group)
    for (factor, gradient), matrix, left, right in zip(parts, matrices, lefts, rights, strict=True):
        mean = left @ right.T
        torch.sub(matrix, mean, out=factor.error)
        factor.right.copy_(right)
        gradient.copy_(mean.view(gradient.shape))


def _average(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """In place, over the ranks, in one message."""
    tensors = list(tensors)
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).div_(group.size())
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _done(buffer: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
    future.set_result(buffer)
    return future
