"""One optimizer step as the options say: parts, precision, clipping, and what keeps it sound."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dtp_trainer.options import Options, Precision
from dtp_trainer.session import shortage
from dtp_trainer.session.distributed import World
from dtp_trainer.session.guard import Finding, Guard, Untouched
from dtp_trainer.session.parts import parts
from dtp_trainer.session.state import Stateful
from dtp_trainer.session.stop import SessionError
from dtp_trainer.session.telemetry import Telemetry

LossOf: TypeAlias = Callable[[Any], Tensor]
"""A batch, or a part of one, to the mean loss of its samples."""

REPORT_NORM_EVERY_S = 1.0
REPORT_NORM_EVERY_STEPS = 16
_TYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


class Update:
    """What `Session.optimize` does."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Stateful | None,
        options: Options,
        world: World,
        telemetry: Telemetry,
    ) -> None:
        self.guard = Guard(options.non_finite, world)
        self._untouched: Untouched | None = None
        self._model, self._optimizer, self._scheduler = model, optimizer, _stepped(scheduler)
        self._options, self._world, self._telemetry = options, world, telemetry
        self._forward: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._norm_told_at = float("-inf")
        self._scaler: torch.amp.GradScaler | None = None
        if options.precision is Precision.FP16:
            self._scaler = torch.amp.GradScaler(world.device.type)
        self._steps, self._tried = 0, 0
        if self._scaler or self.guard.forgives:
            # The first step's update may be left out; the schedule goes by steps all the same.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint holds of it."""
        return {"gradient_scaler": self._scaler} if self._scaler else {}

    def forwards_with(self, model: nn.Module) -> None:
        """`model` averages gradients over the ranks at the end of a backward pass."""
        self._forward.append(model)

    def check_used(self) -> None:
        """Ends the script when options ask for what only `optimize` does, and it was not called."""
        plain, chosen = Options(), self._options
        names = ("precision", "accumulate", "clip_grad_norm", "non_finite")
        asked = [name for name in names if getattr(chosen, name) != getattr(plain, name)]
        if asked and not self._steps:
            raise SessionError(
                f"training.{asked[0]} works in scripts that call session.optimize(loss_of, batch) "
                "instead of backward() and optimizer.step(): docs/session.md"
            )

    def make(self, step: int, loss_of: LossOf, batch: Any) -> Tensor:
        """The mean loss of this rank's share, detached; NaN for a step that was left out before.
        `step` is the one being taken."""
        self._steps += 1
        if self._steps == 1:
            self._begin()
        if self.guard.leaves_out(step):
            loss = torch.full((), math.nan, device=self._world.device)
        else:
            with shortage.named(step, self._world, self._options):
                loss = self._try(step, loss_of, batch)
        self._telemetry.keep({"lr": float(self._optimizer.param_groups[0]["lr"])})
        if self._scheduler:
            self._scheduler.step()
        return loss

    def _begin(self) -> None:
        if self.guard.active and self._world.size > 1 and not self._forward:
            raise SessionError("training.non_finite works with the model that session.ddp() gives")
        self._parameters = self._trained()
        if self.guard.forgives:
            self._untouched = Untouched(self._model, self._world.device)

    def _try(self, step: int, loss_of: LossOf, batch: Any) -> Tensor:
        if self._untouched:
            self._untouched.note()
        self._tried += 1
        loss = self._backward(loss_of, batch)
        finding = self._apply(step, loss)
        if finding is Finding.LEFT_OUT and self._untouched:
            self._untouched.restore()
            self._telemetry.keep({"skipped": self.guard.count})
        for parameter in self._parameters:
            parameter.grad = None
        return loss

    # --------------------------------------------------------------------------------- gradients

    def _backward(self, loss_of: LossOf, batch: Any) -> Tensor:
        total = torch.zeros((), device=self._world.device)
        cut = list(parts(batch, self._options.accumulate))
        for number, (part, weight) in enumerate(cut, start=1):
            with self._averaging(last=number == len(cut)):
                with self._autocast():
                    loss = loss_of(part)
                weighted = loss if weight == 1 else loss * weight
                scaled = self._scaler.scale(weighted) if self._scaler else weighted
                seed = self.guard.seed(loss).to(scaled.dtype) if self.guard.active else None
                scaled.backward(seed)  # type: ignore[no-untyped-call]
            total = total + weighted.detach().reshape(())
        return total

    @contextlib.contextmanager
    def _averaging(self, *, last: bool) -> Iterator[None]:
        """Over the ranks, once: after the last part."""
        with contextlib.ExitStack() as stack:
            for model in self._forward:
                if isinstance(model, DistributedDataParallel):
                    if not (last or self._learning(model)):
                        stack.enter_context(model.no_sync())
                elif hasattr(model, "set_requires_gradient_sync"):  # FSDP2's, not imported here
                    cast(_Sharded, model).set_requires_gradient_sync(last)
            yield

    def _learning(self, model: DistributedDataParallel) -> bool:
        """DDP learns a static graph in its first step, from backward passes that average."""
        return model.static_graph and self._tried == 1

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        wanted = _TYPES.get(self._options.precision)
        if wanted is None:
            return contextlib.nullcontext()
        return torch.autocast(self._world.device.type, dtype=wanted)

    def _trained(self) -> list[nn.Parameter]:
        """Also those whose optimizer state another rank has."""
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        found = {id(p): p for p in [*self._model.parameters(), *held] if p.requires_grad}
        return list(found.values())

    # ------------------------------------------------------------------------------- the weights

    def _apply(self, step: int, loss: Tensor) -> Finding:
        fits = self._unscale()
        finding = self._judged(step, loss, fits=fits)
        if fits and finding is Finding.SOUND:
            self._optimizer.step()
        if self._scaler:
            # A step that is left out for another reason than the scale does not change it.
            same = finding is Finding.LEFT_OUT
            self._scaler.update(self._scaler.get_scale() if same else None)
        return finding

    def _judged(self, step: int, loss: Tensor, *, fits: bool) -> Finding:
        """Gradients are looked at where an option asks for it, and clipped."""
        clip = self._options.clip_grad_norm
        if clip is None and not self.guard.active and not self._telling(step):
            return Finding.SOUND
        norm, finding = self._norm(), Finding.SOUND
        self._tell(step, norm)
        if self.guard.active:
            scaling = self._scaler is not None and not fits and self._scaler.get_scale() > 1
            finding = self.guard.judge(step, loss, norm, may_overflow=scaling)
        if clip is not None and finding is Finding.SOUND:
            clip_grads_with_norm_(self._parameters, clip, norm)
        return finding

    def _unscale(self) -> bool:
        """Whether the scaled gradients of all ranks fitted the range of fp16."""
        if self._scaler is None:
            return True
        # Of all parameters, not of the share that this rank's optimizer may hold: all ranks decide
        # alike. Reading the finding waits for the device, as GradScaler.step does.
        everything = cast(Optimizer, _Group(self._parameters))
        self._scaler.unscale_(everything)
        found = self._scaler._found_inf_per_device(everything)  # noqa: SLF001
        return not any(bool(infinite.item()) for infinite in found.values())

    def _norm(self) -> Tensor:
        """2-norm of all gradients together; a collective where parameters are sharded."""
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return cast(_Sharded, norm).full_tensor() if _is_sharded(norm) else norm

    def _telling(self, step: int) -> bool:
        """Whether the norm is due to be reported: ranks that compute it together go by steps."""
        if any(map(_is_sharded, self._parameters)):
            return step % REPORT_NORM_EVERY_STEPS == 1
        return time.perf_counter() - self._norm_told_at >= REPORT_NORM_EVERY_S

    def _tell(self, step: int, norm: Tensor) -> None:
        """Reading a number of a GPU waits for it."""
        if not norm.is_cuda or self._telling(step):
            self._norm_told_at = time.perf_counter()
            self._telemetry.keep({"grad_norm": norm})


class _Scheduler(Protocol):
    def step(self) -> Any: ...


class _Sharded(Protocol):
    """Of FSDP2's modules and of `DTensor`: importing their packages takes half a second."""

    def set_requires_gradient_sync(self, requires: bool, /) -> None: ...  # noqa: FBT001

    def full_tensor(self) -> Tensor: ...


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _stepped(scheduler: Stateful | None) -> _Scheduler | None:
    """One that goes by a metric is the script's to advance, after its evaluation."""
    if isinstance(scheduler, ReduceLROnPlateau) or not hasattr(scheduler, "step"):
        return None
    return cast(_Scheduler, scheduler)


class _Group:
    """All a `GradScaler` wants of an optimizer whose gradients it divides."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters}]
