"""Who starts the ranks of a generation: dtp itself, or torchrun where the job wants it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from dtp_trainer.gang.messages import Start
from dtp_trainer.ranks.launcher import RankLauncher
from dtp_trainer.ranks.torchrun import Place, TorchrunRanks
from dtp_trainer.wire import Launch

TORCHRUN = "torchrun"

Launcher: TypeAlias = RankLauncher | TorchrunRanks


def launcher_of(launch: Launch, order: Start, shared: RankLauncher) -> Launcher:
    """`shared`, which outlives generations, or a torchrun for this one."""
    if launch.launcher != TORCHRUN:
        return shared
    place = Place(
        nnodes=order.group_world_size,
        node_rank=order.group_rank,
        nproc=launch.nproc_per_node,
        master_addr=order.master_addr,
        master_port=order.master_port,
        run_id=f"{launch.job_id}.g{order.generation}",
    )
    return TorchrunRanks(shared, place, Path(launch.scratch) / f"torchrun.g{order.generation:04d}")


async def let_go(launcher: Launcher, *, at_once: bool) -> None:
    """The generation is over; `at_once`: its ranks were killed."""
    if isinstance(launcher, TorchrunRanks):
        await launcher.aclose(at_once=at_once)
