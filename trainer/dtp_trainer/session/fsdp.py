"""FSDP2 in place: a rank holds rows of each parameter, of its gradient and its optimizer state."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from dtp_trainer.checkpoints.pieces import Part, Piece
from dtp_trainer.checkpoints.tree import UnsupportedState
from dtp_trainer.options import Options, Precision
from dtp_trainer.session.blocks import repeated_blocks
from dtp_trainer.session.distributed import World
from dtp_trainer.session.sharded import mapped, parameter_of
from dtp_trainer.session.state import Sharded
from dtp_trainer.session.stop import SessionError

_REDUCED = {
    Precision.FP32: MixedPrecisionPolicy(),
    Precision.BF16: MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    Precision.FP16: MixedPrecisionPolicy(torch.float16, torch.float32),
}
"""Weights travel and compute in the lower precision; their gradients are summed in fp32."""


def cut(model: nn.Module, optimizer: Optimizer, options: Options, world: World) -> Sharded:
    """Replace the parameters of `model` by this rank's rows of them, in the optimizer too.

    Each repeated block is gathered by itself when its turn comes, the rest with the whole model.
    What is not on its device yet moves there block by block, as it is cut.
    Ends the script with one line where torch or the optimizer refuses.
    """
    before = {id(p): name for name, p in model.named_parameters()}
    _check_known(optimizer, before)
    _spread(chain(model.parameters(), model.buffers()), world)
    mesh = init_device_mesh(world.device.type, (world.size,))
    try:
        for module in (*repeated_blocks(model), model):
            fully_shard(module, mesh=mesh, mp_policy=_policy(model, options.precision))
    except (ValueError, NotImplementedError) as error:
        line = " ".join(str(error).split())
        raise SessionError(f"training.shard: everything cannot cut this model: {line}") from None
    _adopt(optimizer, before, dict(model.named_parameters(remove_duplicate=False)))
    if any(True for _ in model.buffers()):
        model.register_forward_pre_hook(functools.partial(_follow_first, world))
    return Sharded(CutModel(model), CutOptimizer(optimizer), _part(model, optimizer))


def _policy(model: nn.Module, precision: Precision) -> MixedPrecisionPolicy:
    """Batch norm wants its weights in the type of its running statistics: such a model computes in
    the lower precision by autocast alone, and its weights travel as they are."""
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    return _REDUCED[Precision.FP32 if normed else precision]


class CutModel:
    """The state of a model of which each rank has rows."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        seen: dict[int, Piece] = {}
        return {
            # Weights that are tied are one object, and one piece.
            name: seen.setdefault(id(value), _piece(value)) if _is_cut(value) else value
            for name, value in self._model.state_dict(keep_vars=True).items()
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Raises RuntimeError, as torch does, when it is that of another model."""
        here = self._model.state_dict()
        self._model.load_state_dict(
            {name: _own_rows(value, here.get(name)) for name, value in state.items()}
        )


class CutOptimizer:
    """The state of an optimizer of which each rank has rows."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        whole = self._optimizer.state_dict()
        return {**whole, "state": mapped(whole["state"], lambda t: _piece(t) if _is_cut(t) else t)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Raises ValueError, as torch does, when it is that of another optimizer."""
        indices = chain.from_iterable(group["params"] for group in state["param_groups"])
        parameters = chain.from_iterable(g["params"] for g in self._optimizer.param_groups)
        known = dict(zip(indices, parameters, strict=False))
        cut_state = {
            index: _values_like(values, known.get(index))
            for index, values in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": cut_state})


# ------------------------------------------------------------------------------- at the beginning


def _check_known(optimizer: Optimizer, names: dict[int, str]) -> None:
    if any(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
        raise SessionError(
            "training.shard: everything needs an optimizer of the model's own parameters, but it "
            "has some that are not the model's"
        )


def _adopt(optimizer: Optimizer, names: dict[int, str], parameters: dict[str, Tensor]) -> None:
    """The optimizer goes on with the cut parameters, and with the state that it may have."""
    for group in optimizer.param_groups:
        group["params"] = [parameters[names[id(p)]] for p in group["params"]]
    for old in list(optimizer.state):
        new = parameters[names[id(old)]]
        optimizer.state[new] = _values_like(optimizer.state.pop(old), new)


def _spread(tensors: Iterable[Tensor], world: World) -> None:
    """Rank 0's values to all ranks, as DDP does when it is made; a collective."""
    for tensor in tensors:
        copy = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        dist.broadcast(copy, src=0, group=world.agreement if copy.is_cpu else None)
        if not tensor.is_contiguous():
            tensor.detach().copy_(copy.view(tensor.dtype).reshape(tensor.shape))


def _follow_first(world: World, model: nn.Module, _args: object) -> None:
    """Running statistics of rank 0 on all ranks, as DDP has it before each forward pass."""
    if model.training:
        _spread(model.buffers(), world)


# --------------------------------------------------------------------------------------- the rows


def _is_cut(value: Any) -> bool:
    return isinstance(value, DTensor)


def _piece(tensor: Any) -> Piece:
    if tuple(tensor.placements) != (Shard(0),):
        raise UnsupportedState(
            f"a tensor of shape {tuple(tensor.shape)} is spread over the ranks as "
            f"{tensor.placements}: a checkpoint holds rows only; use training.shard: optimizer"
        )
    start, _ = _rows(tensor)
    return Piece(tuple(tensor.shape), tensor.dtype, start, _held(tensor))


def _rows(tensor: Any) -> tuple[int, int]:
    """Where this rank's rows begin and end, as `torch.chunk` cuts."""
    rows, (rank, ranks) = tensor.shape[0], _seat(tensor.device_mesh)
    chunk = -(-rows // ranks)
    start, stop = min(rank * chunk, rows), min((rank + 1) * chunk, rows)
    if _held(tensor).shape[0] != stop - start:
        raise UnsupportedState(f"torch deals {rows} rows to {ranks} ranks in an unknown way")
    return start, stop


@functools.cache
def _seat(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank of how many. A mesh takes longer to say than all the rest of a piece."""
    return mesh.get_local_rank(), mesh.size()


def _held(tensor: Any) -> Tensor:
    """Not `to_local`, which takes its time to record itself for a backward pass."""
    local: Tensor = tensor._local_tensor  # noqa: SLF001
    return local


def _part(model: nn.Module, optimizer: Optimizer) -> Part:
    """The rows that this rank has."""
    weights = model.named_parameters(remove_duplicate=False)
    named = {f"shared.model.{name}": weight for name, weight in weights}
    numbered = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))

    def wanted(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        number = parameter_of(name)
        like = named.get(name)
        if number is not None and number < len(numbered):
            like = numbered[number]
        return _rows(like) if _is_cut(like) and like is not None and like.shape == shape else None

    return wanted


def _own_rows(whole: Any, like: Any) -> Any:
    """This rank's rows of a tensor, or the rows it has of it, where `like` is cut likewise."""
    if not (isinstance(whole, Tensor | Piece) and _is_cut(like) and whole.shape == like.shape):
        return whole
    start, stop = _rows(like)
    if isinstance(whole, Piece):
        rows = torch.empty(0, *whole.shape[1:]) if whole.data is None else whole.data
    else:
        rows = whole[start:stop].clone()  # so that the whole can be given up
    return DTensor.from_local(
        rows.to(like.device, whole.dtype),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size(whole.shape),
        stride=like.stride(),
    )


def _values_like(values: Any, parameter: Any) -> Any:
    return mapped(values, lambda tensor: _own_rows(tensor, parameter))
