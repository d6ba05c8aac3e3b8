"""ZeRO stage 1 on the script's own optimizer: a rank steps its share of the parameters only.

The values that a step gives them are broadcast from their owners. A parameter has one owner, so any
optimizer that steps each parameter by itself works as it is.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dtp_trainer.checkpoints.pieces import Piece
from dtp_trainer.checkpoints.tree import UnsupportedState
from dtp_trainer.session.distributed import World
from dtp_trainer.session.sharded import mapped, parameter_of

_ALIGNED = 64
"""Bytes: kernels round by the alignment of what they are given, and torch's own memory has this."""


def deal(groups: Sequence[Sequence[int]], world_size: int) -> list[list[int]]:
    """The owner of each parameter, from the sizes in each group: large ones first, each to the
    rank that has least so far. Every rank finds the same.

    >>> deal([[5, 9, 4], [1]], 2)
    [[1, 0, 1], [0]]
    """
    loads = [(0, rank) for rank in range(world_size)]
    owners = [[0] * len(sizes) for sizes in groups]
    for number, sizes in enumerate(groups):
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            load, rank = loads[0]
            owners[number][index] = rank
            heapq.heapreplace(loads, (load + sizes[index], rank))
    return owners


class OwnShare:
    """The state of one optimizer over all ranks, each of which has its share of it."""

    def __init__(self, optimizer: Optimizer, world: World) -> None:
        """From now on the groups of `optimizer` have this rank's parameters only."""
        self._optimizer, self._world = optimizer, world
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._names = [group.get("param_names") for group in optimizer.param_groups]
        sizes = [[p.nbytes for p in group] for group in self._groups]
        self._owners = deal(sizes, world.size)
        owned = list(zip(chain(*self._groups), chain(*self._owners), strict=True))
        self._mine = [index for index, (_, owner) in enumerate(owned) if owner == world.rank]
        self._shelves = _shelves(owned, world.size)
        self._described: dict[int, Any] = {}
        self._told: dict[int, Any] | None = None
        self._keep_own()
        self._zero_grad = optimizer.zero_grad
        optimizer.zero_grad = self._zero_all  # type: ignore[method-assign]
        optimizer.register_step_post_hook(self._spread)

    def state_dict(self) -> dict[str, Any]:
        """Of the whole optimizer, the tensors as pieces; a collective.

        Raises:
            UnsupportedState: the optimizer has other groups, or other state, than at the start.
        """
        local = self._optimizer.state_dict()
        if len(local["param_groups"]) != len(self._groups):
            raise UnsupportedState("optimizer has groups that were added after Session was made")
        if not all(isinstance(index, int) for index in local["state"]):
            raise UnsupportedState("optimizer has state that belongs to no parameter")
        mine = {self._mine[index]: values for index, values in local["state"].items()}
        self._describe(mine)
        state = {i: _in_pieces(self._described[i], mine.get(i)) for i in sorted(self._described)}
        return {"state": state, "param_groups": self._whole_groups(local["param_groups"])}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Raises ValueError when it is that of another optimizer."""
        groups = state["param_groups"]
        if [len(g["params"]) for g in groups] != [len(group) for group in self._groups]:
            raise ValueError("the checkpoint has other parameter groups than the script")
        indices = list(chain.from_iterable(group["params"] for group in groups))
        own = {n: state["state"].get(indices[index]) for n, index in enumerate(self._mine)}
        self._optimizer.load_state_dict(
            {
                "state": {number: values for number, values in own.items() if values is not None},
                "param_groups": self._own_groups(groups),
            }
        )

    def part(self, name: str, _shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Nothing of what other ranks own; a `checkpoints.pieces.Part`."""
        number = parameter_of(name)
        return None if number is None or number in self._mine else (0, 0)

    # ------------------------------------------------------------------------------- the groups

    def _keep_own(self) -> None:
        for group, parameters, owners in self._by_group():
            group["params"] = self._of_rank(parameters, owners)
            if "param_names" in group:
                group["param_names"] = self._of_rank(group["param_names"], owners)
            for parameter, owner in zip(parameters, owners, strict=True):
                if owner != self._world.rank:
                    self._optimizer.state.pop(parameter, None)

    def _by_group(self) -> Iterator[tuple[dict[str, Any], list[Tensor], list[int]]]:
        return zip(self._optimizer.param_groups, self._groups, self._owners, strict=True)

    def _of_rank(self, items: Sequence[Any], owners: Sequence[int]) -> list[Any]:
        return [
            item for item, owner in zip(items, owners, strict=True) if owner == self._world.rank
        ]

    def _whole_groups(self, local: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As the script made them, with what training made of their learning rates."""
        wholes, first = [], 0
        for group, parameters, names in zip(local, self._groups, self._names, strict=True):
            named = {} if names is None else {"param_names": names}
            indices = list(range(first, first + len(parameters)))
            wholes.append({**group, **named, "params": indices})
            first += len(parameters)
        return wholes

    def _own_groups(self, wholes: list[dict[str, Any]]) -> list[dict[str, Any]]:
        local, first = [], 0
        for group, owners in zip(wholes, self._owners, strict=True):
            names = group.get("param_names")
            named = {} if names is None else {"param_names": self._of_rank(names, owners)}
            count = owners.count(self._world.rank)
            local.append({**group, **named, "params": list(range(first, first + count))})
            first += count
        return local

    # -------------------------------------------------------------------------------- the hooks

    def _zero_all(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's own
        """Gradients that this rank does not step are there all the same."""
        with self._all_parameters():
            self._zero_grad(set_to_none=set_to_none)

    @contextlib.contextmanager
    def _all_parameters(self) -> Iterator[None]:
        own = [group["params"] for group in self._optimizer.param_groups]
        for group, parameters, _ in self._by_group():
            group["params"] = parameters
        try:
            yield
        finally:
            for group, parameters in zip(self._optimizer.param_groups, own, strict=True):
                group["params"] = parameters

    def _spread(self, *_: object) -> None:
        """After a step: each owner's new values to all ranks; a collective."""
        for shelf in self._shelves:
            shelf.settle()
        works = [dist.broadcast(s.memory, src=s.owner, async_op=True) for s in self._shelves]
        for work in works:
            if work is not None:
                work.wait()

    def _describe(self, mine: Mapping[int, Any]) -> None:
        """Learn the shapes of the others' state; again only when they changed on any rank."""
        told = {index: mapped(values, _described) for index, values in mine.items()}
        if self._world.maximum([int(told != self._told)]) == [0]:
            return
        parts: list[Any] = [None] * self._world.size
        dist.all_gather_object(parts, told, group=self._world.agreement)
        self._described = {index: values for part in parts for index, values in part.items()}
        self._told = told


# ------------------------------------------------------------------------------------ the shelves


class _Shelf:
    """The parameters of one owner side by side in memory: one broadcast carries them, uncopied."""

    def __init__(self, owner: int, parameters: list[Tensor]) -> None:
        self.owner = owner
        self._parameters = parameters
        self._places: list[int] = []
        self.settle()

    def settle(self) -> None:
        """Take in what was moved out of its place, as by ``parameter.data = …``."""
        if self._places != [p.data_ptr() for p in self._parameters]:
            self._fill()

    def _fill(self) -> None:
        sizes = [-(-p.nbytes // _ALIGNED) * _ALIGNED for p in self._parameters]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self._parameters[0].device)
        for parameter, part in zip(self._parameters, torch.split(memory, sizes), strict=True):
            place = _like(part[: parameter.nbytes].view(parameter.dtype), parameter)
            parameter.data = place.copy_(parameter.data)
        self.memory = memory
        self._places = [p.data_ptr() for p in self._parameters]


def _shelves(owned: list[tuple[Tensor, int]], world_size: int) -> list[_Shelf]:
    shelves = []
    for owner in range(world_size):
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter, whose in owned:
            if whose == owner and parameter.numel():
                by_device.setdefault(parameter.device, []).append(parameter)
        shelves += [_Shelf(owner, parameters) for parameters in by_device.values()]
    return shelves


def _like(memory: Tensor, parameter: Tensor) -> Tensor:
    """Laid out as it was: channels last, say."""
    dense = torch.empty_like(parameter, device="meta", memory_format=torch.preserve_format)
    return memory.as_strided(parameter.shape, dense.stride())


# ------------------------------------------------------------------------------------- the pieces


@dataclass(frozen=True, slots=True)
class _Described:
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None
    """Where it is not contiguous."""


def _described(tensor: Tensor) -> _Described:
    stride = None if tensor.is_contiguous() else tensor.stride()
    return _Described(tuple(tensor.shape), tensor.dtype, stride)


def _in_pieces(described: Any, values: Any) -> Any:
    """`values` where this rank has them, and else only what is known of their shapes."""
    if isinstance(described, _Described):
        return Piece(described.shape, described.dtype, 0, values, described.stride)
    if isinstance(described, dict):
        own = values or {}
        return {key: _in_pieces(item, own.get(key)) for key, item in described.items()}
    if isinstance(described, list | tuple):
        items = values or [None] * len(described)
        return type(described)(map(_in_pieces, described, items))
    return described
