"""Where a model is cut, for what is done block by block: sharding, activation checkpointing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer, the residual blocks of a ResNet: modules made of modules, with
    parameters, of which one parent has several of the same class. The outermost ones, in order;
    none in a model that repeats nothing.
    """
    return list(dict.fromkeys(_blocks(model)))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    kinds = Counter(type(child) for child in children)
    for child in children:
        if kinds[type(child)] > 1 and _is_block(child):
            yield child
        else:
            yield from _blocks(child)


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS) or not any(module.children()):
        return False
    return any(True for _ in module.parameters())
