"""What a rank keeps of model and optimizer: all of it, or its part (`training.shard`).

Whichever it is, a checkpoint holds the same: the state of the whole model under its own names, and
that of the whole optimizer under the numbers that the script gave its parameters. So a job goes on
with another choice, and at another world size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, assert_never

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from dtp_trainer.checkpoints.pieces import Piece
from dtp_trainer.options import Options, Shard
from dtp_trainer.session.distributed import World
from dtp_trainer.session.state import Sharded, Stateful
from dtp_trainer.session.stop import SessionError

_OF_OPTIMIZER = re.compile(r"shared\.optimizer\.state\.(\d+)\.")


def shard(
    model: nn.Module,
    optimizer: Optimizer,
    others: Mapping[str, Stateful],
    options: Options,
    world: World,
) -> Sharded:
    """Cut model and optimizer as the options say, in place; before anything wraps the model, and
    after it is on its device, unless it `moves_in_parts`. One rank alone keeps everything.

    Ends the script with one line where it cannot be done.
    """
    if options.shard is Shard.NOTHING:
        return Sharded(model, optimizer)
    _check(model, optimizer, others, options)
    if world.size == 1:
        return Sharded(model, optimizer)
    match options.shard:
        case Shard.OPTIMIZER:
            from dtp_trainer.session.zero1 import OwnShare  # noqa: PLC0415

            share = OwnShare(optimizer, world)
            return Sharded(model, share, share.part)
        case Shard.EVERYTHING:
            from dtp_trainer.session.fsdp import cut  # noqa: PLC0415

            return cut(model, optimizer, options, world)
        case unreachable:
            assert_never(unreachable)


def moves_in_parts(options: Options, world: World) -> bool:
    """The model may not fit its device whole: `shard` moves it, one block at a time."""
    return options.shard is Shard.EVERYTHING and world.size > 1


def parameter_of(name: str) -> int | None:
    """The number of the parameter to whose optimizer state a tensor in a checkpoint belongs.

    >>> parameter_of("shared.optimizer.state.12.exp_avg"), parameter_of("shared.model.weight")
    (12, None)
    """
    found = _OF_OPTIMIZER.match(name)
    return int(found[1]) if found else None


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A state with each tensor, or piece of one, in its dicts, lists and tuples replaced."""
    if isinstance(value, Tensor | Piece):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def _check(
    model: nn.Module, optimizer: Optimizer, others: Mapping[str, Stateful], options: Options
) -> None:
    for refused in (_of_optimizer(optimizer), _of_model(model), _of_others(others, options)):
        if refused:
            raise SessionError(f"training.shard: {options.shard} {refused}")


def _of_optimizer(optimizer: Optimizer) -> str | None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, LBFGS) or not isinstance(optimizer, Optimizer):
        return f"needs an optimizer that steps each parameter by itself, which {kind} does not"
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(not isinstance(key, Tensor) or id(key) not in mine for key in optimizer.state):
        return f"needs an optimizer whose state belongs to its parameters: {kind} has other state"
    if kind == "ZeroRedundancyOptimizer":
        return "takes the place of ZeroRedundancyOptimizer: give Session the plain optimizer"
    return None


def _of_model(model: nn.Module) -> str | None:
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        return f"needs a model that has its weights: {lazy[0]} waits for a first forward pass"
    if hasattr(model, "no_sync"):
        return "needs the bare model: give Session the one that is not wrapped yet"
    return None


def _of_others(others: Mapping[str, Stateful], options: Options) -> str | None:
    if options.shard is not Shard.EVERYTHING:
        return None
    second = [name for name, item in others.items() if isinstance(item, Optimizer)]
    if second:
        return f"works with one optimizer, but state has another one: {second[0]}"
    return None
