"""A model made ready for the forward pass as the options say: its memory, its compiler, its DDP."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from dtp_trainer.options import CommHook, Compile, Options, Shard
from dtp_trainer.session.distributed import World
from dtp_trainer.session.powersgd import Errors, PowerSGD
from dtp_trainer.session.recompute import recompute_blocks
from dtp_trainer.session.state import Stateful
from dtp_trainer.session.stop import SessionError

_FUSED = (Adam, AdamW, SGD)
_SETTLED_WITH = {"bucket_cap_mb", "gradient_as_bucket_view"}


def prepare(model: nn.Module, optimizer: Optimizer, options: Options, device: torch.device) -> None:
    """What is done before the model moves to its device. Ends the script with one line where an
    option cannot do what it says."""
    if options.compile is not Compile.OFF:
        _check_compiler(device)
    if options.channels_last:
        _channels_last(model, optimizer)
    if options.activation_checkpointing and not recompute_blocks(model):
        raise SessionError(
            "training.activation_checkpointing finds no repeated blocks: it looks for modules "
            "made of modules, of which one parent has several of the same class"
        )
    if options.fused_optimizer:
        _fuse(optimizer)


class Compression:
    """What travels in place of gradients, and what a checkpoint holds of it."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        """`model` on its device."""
        self._options = options
        self._power_sgd: PowerSGD | None = None
        if options.comm_hook is CommHook.POWERSGD:
            self._power_sgd = PowerSGD(model, options.powersgd_rank)

    def states(self) -> dict[str, Stateful]:
        """The same on all ranks."""
        return {"powersgd": self._power_sgd} if self._power_sgd else {}

    def own_states(self) -> dict[str, Stateful]:
        """Of this rank alone."""
        return {"powersgd": Errors(self._power_sgd)} if self._power_sgd else {}

    def of(self, ddp: DistributedDataParallel) -> None:
        """Compress its gradients from now on."""
        if self._options.comm_hook is CommHook.OFF:
            return
        hook = self._power_sgd.hook if self._power_sgd else _CAST[self._options.comm_hook]

        def called(group: Any, bucket: Any) -> Any:
            return hook(group, bucket)

        called.__annotations__ = {}  # DDP would compare them, and they are text here
        ddp.register_comm_hook(ddp.process_group, called)


def wrapped(
    model: nn.Module,
    world: World,
    options: Options,
    compression: Compression,
    **given: Any,
) -> nn.Module:
    """The model in `DistributedDataParallel`; itself for a single rank, or when it is sharded.

    `given` are options of `DistributedDataParallel`; those of the job win.
    """
    if options.compile is not Compile.OFF:
        _compile(model, options)
    if world.size == 1 or options.shard is Shard.EVERYTHING:
        return model
    if options.static_graph:
        given["static_graph"] = True
    if options.bucket_mb is not None:
        given["bucket_cap_mb"] = options.bucket_mb
    if options.gradient_as_bucket_view:
        given["gradient_as_bucket_view"] = True
    devices = [world.device.index] if world.device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=devices, **given)
    if world.device.type == "cpu" and world.size > 2 and set(given) <= _SETTLED_WITH:
        _settle_buckets(ddp)
    compression.of(ddp)
    return ddp


def _settle_buckets(ddp: DistributedDataParallel) -> None:
    """Let DDP arrange its buckets now instead of after the first step.

    Three numbers are summed in an order that depends on their place in a bucket. A resumed job,
    whose first step is in the middle, would otherwise round that one step differently from a job
    that was never paused. The backward pass of nothing at all gives DDP its order of gradients. A
    graph that is static by promise cannot be settled: DDP would hold it to this pass.
    """
    parameters = [p for p in ddp.module.parameters() if p.requires_grad]
    kept = [p.grad for p in parameters]
    nothing = torch.stack([(p * 0).sum() for p in parameters]).sum()
    ddp.reducer.prepare_for_backward([])
    nothing.backward()  # type: ignore[no-untyped-call]
    ddp.reducer._rebuild_buckets()  # noqa: SLF001
    for parameter, grad in zip(parameters, kept, strict=True):
        parameter.grad = grad


# ------------------------------------------------------------------------------------- gradients


def _cast(half: torch.dtype, group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """The library has the same, but refuses bf16 on gloo, which can do it."""
    buffer = bucket.buffer()
    sent = buffer.to(half).div_(group.size())
    future = dist.all_reduce(sent, group=group, async_op=True).get_future()
    received: Future[Tensor] = future.then(lambda done: buffer.copy_(done.value()[0]))
    return received


_CAST = {
    CommHook.FP16: functools.partial(_cast, torch.float16),
    CommHook.BF16: functools.partial(_cast, torch.bfloat16),
}


# ------------------------------------------------------------------------------------ the compiler


def _compile(model: nn.Module, options: Options) -> None:
    """In place: names in checkpoints stay what they are, and so do hooks."""
    if options.activation_checkpointing:
        # Cutting the graph at bucket borders does not go with it.
        import torch._dynamo  # noqa: PLC0415 - takes a second

        torch._dynamo.config.optimize_ddp = False  # noqa: SLF001
    model.compile(mode=options.compile.value)


def _check_compiler(device: torch.device) -> None:
    cpu = device.type == "cpu"
    named = os.environ.get("CXX" if cpu else "CC")
    candidates = [named] if named else ["g++"] if cpu else ["gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in candidates):
        raise SessionError(
            f"training.compile needs a {'C++' if cpu else 'C'} compiler on every worker, and "
            f"{' or '.join(candidates)} is not there: install it, or leave compile out"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SessionError(
            "training.compile needs Python's headers on every worker (Python.h, in python3-dev): "
            "install them, or leave compile out"
        )


# --------------------------------------------------------------------------- memory and optimizer


def _channels_last(model: nn.Module, optimizer: Optimizer) -> None:
    if not any(parameter.dim() == 4 for parameter in model.parameters()):
        raise SessionError("training.channels_last: the model has no 2-d convolutions")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # A torch of its own opinion about kernels of one by one; it is no error, and nothing to do.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    optimizer.register_load_state_dict_post_hook(_as_parameters_lie)


def _as_parameters_lie(optimizer: Optimizer) -> None:
    """Fused kernels go through parameter and state by address. A checkpoint of a time without
    channels-last has the state in another order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() == 4:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _fuse(optimizer: Optimizer) -> None:
    if type(optimizer) not in _FUSED:
        known = ", ".join(kind.__name__ for kind in _FUSED)
        raise SessionError(
            f"training.fused_optimizer: {type(optimizer).__name__} has no fused kernel that is "
            f"known to work ({known} have)"
        )
    if any(group["differentiable"] for group in optimizer.param_groups):
        raise SessionError("training.fused_optimizer does not go with differentiable=True")
    _set_fused(optimizer.param_groups)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: _set_fused(state["param_groups"]))


def _set_fused(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        group.update(fused=True, foreach=False)
