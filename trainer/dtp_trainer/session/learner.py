"""The model and what trains it, made as the options want them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from dtp_trainer.checkpoints.pieces import Part
from dtp_trainer.options import Options
from dtp_trainer.session import parallel
from dtp_trainer.session.distributed import World
from dtp_trainer.session.sharded import moves_in_parts, shard
from dtp_trainer.session.state import Stateful, TrainingState, unwrapped
from dtp_trainer.session.telemetry import Telemetry
from dtp_trainer.session.update import Update


@dataclass(frozen=True, slots=True)
class Learner:
    compression: parallel.Compression
    update: Update
    state: TrainingState
    """All of it that must survive a pause."""
    part: Part | None
    """What this rank wants of a checkpoint; None: whole tensors."""


def learner(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Stateful | None,
    others: Mapping[str, Stateful],
    *,
    options: Options,
    world: World,
    telemetry: Telemetry,
) -> Learner:
    """In place. The order matters: options that change the model, to the device, then the shards,
    which need the device's tensors or move them. Ends the script with one line where an option
    cannot do what it says."""
    parallel.prepare(model, optimizer, options, world.device)
    if not moves_in_parts(options, world):
        model.to(world.device)
    compression = parallel.Compression(model, options)
    update = Update(model, optimizer, scheduler, options, world, telemetry)
    kept = {**others, **update.states(), **compression.states()}
    sharded = shard(unwrapped(model), optimizer, kept, options, world)
    own = compression.own_states()
    state = TrainingState(model, sharded, scheduler, kept, world, own)
    return Learner(compression, update, state, sharded.part)
