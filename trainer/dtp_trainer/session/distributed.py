"""The process group: joined when the environment names one, with a gloo group for agreement."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from dtp_trainer.wire import Env

JOIN_WITHIN = timedelta(seconds=60)
"""For all ranks to come; they start within a second of each other, or never."""
WAIT_LONG = timedelta(minutes=30)
"""In a collective before the first step and around the last: one rank may load or write
gigabytes, or compile, while the others wait for it."""
WAIT = timedelta(minutes=10)
"""In a collective between two steps, where the job does not say what a step may take."""
SHORTEST_WAIT = timedelta(seconds=60)
_GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class World:
    """This rank among the ranks. One rank of one when there is no process group."""

    rank: int
    size: int
    device: torch.device
    agreement: dist.ProcessGroup | None
    """For small CPU tensors, beside the group that carries gradients: a collective of ours never
    queues behind, or pairs with, one of the script's. None for a single rank."""
    joined_here: bool
    """This process group was made by `join`, so `leave` ends it."""

    def maximum(self, values: list[int]) -> list[int]:
        """Element-wise over all ranks; a collective."""
        return self.maximum_later(values)()

    def maximum_later(self, values: list[int]) -> Callable[[], list[int]]:
        """As `maximum`, begun now; the result is waited for when it is called for."""
        if self.agreement is None:
            return lambda: values
        vector = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=self.agreement, async_op=True)

        def result() -> list[int]:
            work.wait()
            return [int(value) for value in vector.tolist()]

        return result

    def sum(self, values: Tensor) -> Tensor:
        """Over all ranks, on the CPU; a collective."""
        total = values.detach().cpu().clone()
        if self.agreement is not None:
            dist.all_reduce(total, group=self.agreement)
        return total

    def of_first(self, values: Tensor) -> Tensor:
        """Rank 0's, on the CPU, of one dimension; a collective."""
        copy = values.detach().cpu().clone()
        if self.agreement is not None:
            dist.broadcast(copy.view(torch.uint8), src=0, group=self.agreement)
        return copy

    def told_by_first(self, text: str) -> str:
        """Rank 0's; a collective."""
        told = [text]
        if self.agreement is not None:
            dist.broadcast_object_list(told, src=0, group=self.agreement)
        return told[0]

    def wait_briefly(self) -> None:
        """From the first step on, in collectives of all ranks: twice what the job allows between
        two steps, so that its own watchdog, which can name a rank, is always first."""
        if os.environ.get(Env.GENERATION):
            self._wait_at_most(_patience(os.environ.get(Env.NO_STEP_FOR)))

    def wait_long(self) -> None:
        """For a rank that loads or writes what all of them need."""
        self._wait_at_most(WAIT_LONG)

    def _wait_at_most(self, patience: timedelta) -> None:
        if self.agreement is not None:
            _set_pg_timeout(patience, self.agreement)
        if self.joined_here:
            _set_pg_timeout(patience)

    def leave(self) -> None:
        if self.joined_here and dist.is_initialized():
            dist.destroy_process_group()


def join() -> World:
    """Join the process group that torchrun's variables describe, use one that exists, or be alone.

    gloo on the CPU; with CUDA, NCCL for the device's tensors and gloo for the CPU's. Other ranks
    have a minute to come.

    Raises: `torch.distributed.DistError` or RuntimeError when they do not come.
    """
    device = _device()
    joined_here = not dist.is_initialized() and all(os.environ.get(v) for v in _GROUP_VARIABLES)
    if joined_here:
        _join(device)
    if not dist.is_initialized():
        return World(0, 1, device, None, joined_here=False)
    size = dist.get_world_size()
    agreement = dist.new_group(backend="gloo", timeout=JOIN_WITHIN) if size > 1 else None
    world = World(dist.get_rank(), size, device, agreement, joined_here=joined_here)
    world.wait_long()
    return world


def _join(device: torch.device) -> None:
    store, rank, size = next(rendezvous("env://", timeout=JOIN_WITHIN))
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("dtp", store),
        rank=rank,
        world_size=size,
        timeout=JOIN_WITHIN,
    )


def _patience(no_step_for: str | None) -> timedelta:
    """
    >>> [_patience(text).total_seconds() for text in ("900", "5", "")]
    [1800.0, 60.0, 600.0]
    """
    return max(2 * timedelta(seconds=float(no_step_for)), SHORTEST_WAIT) if no_step_for else WAIT


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
