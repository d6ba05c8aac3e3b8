"""Activation checkpointing: repeated blocks keep their input alone and compute the rest again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dtp_trainer.session.blocks import repeated_blocks


def recompute_blocks(model: nn.Module) -> bool:
    """Let each repeated block of `model` be computed again in backward; False: it has none."""
    found = repeated_blocks(model)
    for block in found:
        if not isinstance(block, _Recomputed):
            # A new class keeps names and hooks as they are; copies of the block stay what it is.
            block.__class__ = type(type(block).__name__, (_Recomputed, type(block)), {})
    return bool(found)


class _Recomputed(nn.Module):
    """Comes before the class of a block."""

    def forward(self, *args: Any, **options: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **options)
        if torch.compiler.is_compiling():
            return checkpoint(super().forward, *args, use_reentrant=False, **options)
        return checkpoint(
            super().forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(self)),
            **options,
        )


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norm has counted this batch already: what it counts again goes into copies."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]
    for norm, buffers in kept:
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in kept:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
