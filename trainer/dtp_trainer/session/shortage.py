"""Out of memory, said in one line: which rank, in which step, and what helps."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from dtp_trainer.options import Options, Shard
from dtp_trainer.session.distributed import World
from dtp_trainer.session.stop import SessionError

_CPU_REFUSAL = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


@contextlib.contextmanager
def named(step: int, world: World, options: Options) -> Iterator[None]:
    """While the block runs, being refused memory ends the script with one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        asked = _ASKED.search(str(error))
        wanted = f" asking for {asked[1]}" if asked else ""
        raise SessionError(
            f"rank {world.rank} ran out of memory on {world.device} in step {step}{wanted}. "
            f"What helps: {', '.join(_advice(world, options))}"
        ) from None


def _is_shortage(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return bool(_CPU_REFUSAL.search(str(error)))


def _advice(world: World, options: Options) -> Iterator[str]:
    """What is not in use yet; the cheapest first."""
    if not options.activation_checkpointing:
        yield "training: {activation_checkpointing: true}"
    yield f"accumulate: {2 * options.accumulate}"
    if options.shard is Shard.NOTHING and world.size > 1:
        yield "shard: optimizer"
    elif options.shard is Shard.OPTIMIZER:
        yield "shard: everything"
    yield "a smaller global_batch"
