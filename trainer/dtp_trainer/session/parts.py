"""A batch in parts, for a step that computes them one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor


def parts(batch: Any, count: int) -> Iterator[tuple[Any, float]]:
    """Each part of a batch with its share of the samples, in order; together they weigh 1.

    Tensors of at least one dimension, alone or in tuples, lists and dicts, are split along their
    first one, the samples; the rest goes into each part as it is. A batch of fewer samples than
    `count` has as many parts as samples. Sizes differ by one sample at most.

    Raises:
        ValueError: there are no such tensors, or they differ in their number of samples.
    """
    if count == 1:
        yield batch, 1.0
        return
    size = _samples(batch)
    count = min(count, size)
    edges = [size * number // count for number in range(count + 1)]
    for start, stop in pairwise(edges):
        yield _cut(batch, start, stop), (stop - start) / size


def _samples(batch: Any) -> int:
    sizes = {len(tensor) for tensor in _tensors(batch)}
    if len(sizes) == 1 and (size := sizes.pop()) > 0:
        return size
    found = f"found {sorted(sizes)}" if sizes else "found no tensors"
    raise ValueError(
        f"a batch can be split only where all its tensors have one number of samples: {found}"
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.dim():
            yield batch
    elif isinstance(batch, dict | list | tuple):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(value)


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.dim() else batch
    if isinstance(batch, dict):
        return {key: _cut(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        cut = [_cut(value, start, stop) for value in batch]
        return type(batch)(*cut) if hasattr(batch, "_fields") else type(batch)(cut)
    return batch
