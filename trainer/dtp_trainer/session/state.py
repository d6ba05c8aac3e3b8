"""All that must survive a pause: model, optimizer, scheduler, other objects, random generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtp_trainer.checkpoints.checkpoint import LoadedCheckpoint, StateBundle
from dtp_trainer.checkpoints.pieces import Part
from dtp_trainer.session import randomness
from dtp_trainer.session.distributed import World


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Sharded:
    """Model and optimizer as a checkpoint sees them: whole, in pieces where a rank has but a part.

    Where parts are shared, `state_dict` is a collective.
    """

    model: Stateful
    optimizer: Stateful
    part: Part | None = None
    """What `load_state_dict` wants of a checkpoint; None: whole tensors."""


class TrainingState:
    """The objects of one rank whose state a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        sharded: Sharded,
        scheduler: Stateful | None,
        others: Mapping[str, Stateful],
        world: World,
        own: Mapping[str, Stateful] | None = None,
    ) -> None:
        """`own` has what differs from rank to rank; at another world size it begins anew."""
        self._own = own or {}
        self._model = unwrapped(model)
        self._model_state = sharded.model
        self._world = world
        self._objects: dict[str, Stateful] = {
            "optimizer": sharded.optimizer,
            **_prefixed(others),
        }
        if scheduler is not None:
            self._objects["scheduler"] = scheduler

    def bundle(self) -> StateBundle:
        """By reference; a collective, for every rank at the same step."""
        model = self._model_state.state_dict()
        model = {**model, **self._buffers(model)}
        shared = {name: item.state_dict() for name, item in self._objects.items()}
        own = {name: item.state_dict() for name, item in self._own.items()}
        own["random"] = randomness.capture(self._world.device)
        return StateBundle(shared={"model": model, **shared}, own=own)

    def load(self, loaded: LoadedCheckpoint) -> None:
        """Raises ValueError, in one line, when the checkpoint is of another model or script."""
        missing = {"model", *self._objects} ^ set(loaded.shared)
        if missing:
            raise ValueError(f"{_listed(missing)} only in one of checkpoint and script")
        for name, item in {"model": self._model_state, **self._objects}.items():
            try:
                item.load_state_dict(loaded.shared[name])
            except (RuntimeError, KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{name}: {_first_line(error)}") from None
        if loaded.own is not None:
            for name, item in self._own.items():
                item.load_state_dict(loaded.own[name])

    def load_random(self, loaded: LoadedCheckpoint) -> None:
        """This rank's own generators; new ones, the same at each try, at another world size."""
        if loaded.own is None:
            randomness.reseed(loaded.step, self._world.rank, self._world.size)
        else:
            randomness.restore(loaded.own["random"], self._world.device)

    def _buffers(self, kept: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rank 0's, as DDP has it: running statistics of other ranks differ until the next forward
        pass overwrites them, and a checkpoint mixes the shares of all ranks."""
        if self._world.size == 1:
            return {}
        named = {name: b for name, b in self._model.named_buffers() if name in kept}
        by_type: dict[torch.dtype, dict[str, Tensor]] = {}
        for name, buffer in named.items():
            by_type.setdefault(buffer.dtype, {})[name] = buffer
        return {n: b for group in by_type.values() for n, b in self._first_ranks(group).items()}

    def _first_ranks(self, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([tensor.detach().flatten() for tensor in group.values()])
        parts = torch.split(
            self._world.of_first(flat), [tensor.numel() for tensor in group.values()]
        )
        return {
            name: part.view_as(tensor)
            for (name, tensor), part in zip(group.items(), parts, strict=True)
        }


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _prefixed(others: Mapping[str, Stateful]) -> dict[str, Stateful]:
    return {f"state.{name}": item for name, item in others.items()}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
