"""Batches on their way to the device, while it computes the step before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sent:
    """Tensors of a GPU that are complete once it has come past `arrival`."""

    batch: Any
    arrival: torch.cuda.Event


class Transport:
    """Sends on one thread, receives on another. On the CPU there is no way to go."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, batch: Any) -> Any:
        """Begin the copy, beside what the device computes: from memory that it reads by itself, in
        a stream of its own. What comes back is for `receive` only."""
        if self._stream is None:
            return batch
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            moved = each_tensor(batch, self._copied)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(self._stream)
        return Sent(moved, arrival)

    def receive(self, sent: Any) -> Any:
        """The batch on its device; the device waits for it, the caller does not."""
        if not isinstance(sent, Sent):
            return sent
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(sent.arrival)

        def used_in_step(tensor: Tensor) -> Tensor:
            # Its memory was made in the other stream, which must not use it again too early.
            if tensor.is_cuda:
                tensor.record_stream(stream)
            return tensor

        return each_tensor(sent.batch, used_in_step)

    def _copied(self, tensor: Tensor) -> Tensor:
        source = tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()
        return source.to(self._device, non_blocking=True)


def each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with its tensors (alone, or in tuples, lists and dicts) changed; the rest as it
    is."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: each_tensor(value, change) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        changed = [each_tensor(value, change) for value in batch]
        return type(batch)(*changed) if hasattr(batch, "_fields") else type(batch)(changed)
    return batch
