"""Losses and gradients that are no numbers: seen before they reach the weights, and what is done.

A loss that is not finite makes the gradients of its rank NaN, and averaging makes those of all
ranks NaN; so all ranks see it after the same backward pass, with no word between them. Only then do
they exchange whose loss it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from dtp_trainer.options import NonFinite
from dtp_trainer.session.distributed import World
from dtp_trainer.session.stop import SessionError
from dtp_trainer.session.telemetry import say

SKIPS_IN_A_ROW = 10
"""So many steps left out one after the other, and the next one ends the job."""
RETURNS_TO_A_CHECKPOINT = 3
"""So many returns to one checkpoint, and the next one ends the job."""
_NAN, _INFINITE = 1, 2


class Unsound(SessionError):
    """All ranks end, at the same step."""

    def __init__(self, text: str, *, own: bool = True) -> None:
        """`own`: it may be this rank's fault, and is not known to be another's."""
        super().__init__(text)
        self.own = own


class Finding(Enum):
    """What becomes of a step."""

    SOUND = auto()
    OVERFLOW = auto()
    """Scaled gradients left the range of fp16: the scaler's own business."""
    LEFT_OUT = auto()


class Guard:
    """Which steps are left out. All ranks hold the same."""

    def __init__(self, mode: NonFinite, world: World) -> None:
        self._mode, self._world = mode, world
        self._left_out: list[int] = []
        self._streak: list[int] = []
        self._returns: list[int] = []
        self.wants_back = False
        """The job is to go back to its newest checkpoint at the end of this step."""

    @property
    def active(self) -> bool:
        return self._mode is not NonFinite.IGNORE

    @property
    def forgives(self) -> bool:
        """A step may be left out; so what its forward pass changes has to be undone."""
        return self._mode in (NonFinite.SKIP, NonFinite.ROLLBACK)

    @property
    def count(self) -> int:
        """Steps left out so far, over all attempts."""
        return len(self._left_out)

    def leaves_out(self, step: int) -> bool:
        """It was found unsound before the job went back."""
        return step in self._left_out

    def seed(self, loss: Tensor) -> Tensor:
        """What `backward` begins with: 1, or NaN where the loss is not finite. A loss can be NaN
        and have finite gradients, on one rank alone."""
        return torch.where(torch.isfinite(loss.detach()), 1.0, math.nan).to(loss.dtype)

    def judge(self, step: int, loss: Tensor, norm: Tensor, *, may_overflow: bool) -> Finding:
        """Of a step whose gradients are averaged. Reads `norm`, which waits for the device.

        Ends the script with STOP, or when it was lenient too often.
        """
        if math.isfinite(norm.item()):
            self._streak.clear()
            return Finding.SOUND
        flaws = self._world.maximum(_placed(_flaw(loss.item()), self._world))
        if may_overflow and not any(flaws):
            return Finding.OVERFLOW
        own = bool(flaws[self._world.rank]) or not any(flaws)
        self._act(step, f"step {step}: {_told(flaws)}", own=own)
        return Finding.LEFT_OUT

    def went_back(self, step: int | None) -> None:
        """To the checkpoint of that step; None: there is none, and the step is only left out."""
        self.wants_back = False
        if step is None:
            return
        self._returns = [*(s for s in self._returns if s == step), step]
        if len(self._returns) > RETURNS_TO_A_CHECKPOINT:
            unsound = _listed(self._left_out[-len(self._returns) :])
            raise Unsound(
                f"step {self._left_out[-1]}: not finite again after {RETURNS_TO_A_CHECKPOINT} "
                f"returns to the checkpoint of step {step}; lower the learning rate, or look at "
                f"the data of steps {unsound}"
            )

    def state(self) -> dict[str, Any]:
        """For the checkpoint's part about the data: plain JSON, nothing when no step is missing."""
        return {"left_out": self._left_out} if self._left_out else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Steps found since that checkpoint stay left out."""
        kept = {*map(int, state.get("left_out", ())), *self._left_out}
        self._left_out = sorted(kept)

    def _act(self, step: int, what: str, *, own: bool) -> None:
        match self._mode:
            case NonFinite.IGNORE:
                pass
            case NonFinite.STOP:
                raise Unsound(
                    f"{what}; the weights are untouched (training: {{non_finite: skip}} would go "
                    "on without the step)",
                    own=own,
                )
            case NonFinite.SKIP:
                self._leave_out(step, what, own=own)
            case NonFinite.ROLLBACK:
                self._leave_out(step, what, own=own)
                self.wants_back = True
            case unreachable:
                assert_never(unreachable)

    def _leave_out(self, step: int, what: str, *, own: bool) -> None:
        self._streak.append(step)
        if len(self._streak) > SKIPS_IN_A_ROW:
            raise Unsound(
                f"{what}; so were the {SKIPS_IN_A_ROW} steps before it, so the job ends", own=own
            )
        self._left_out = sorted({*self._left_out, step})
        if self._world.rank == 0:
            say(f"{what}; its update is left out ({self.count} so far)")


class Untouched:
    """What a forward pass changes besides gradients, as it was before: buffers (the running
    statistics of batch norm), the random generators of torch and Python. Noted before each step, so
    numpy's is left out: asking for it takes ten times as long as all the rest."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        kept = model.state_dict(keep_vars=True)
        self._live = [b for name, b in model.named_buffers() if name in kept and b.numel()]
        self._copies = [torch.empty_like(buffer) for buffer in self._live]
        self._device = device
        self._random: list[Any] = []

    @torch.no_grad()
    def note(self) -> None:
        if self._live:
            torch._foreach_copy_(self._copies, self._live)
        self._random = [random.getstate(), torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self._device))

    @torch.no_grad()
    def restore(self) -> None:
        if self._live:
            torch._foreach_copy_(self._live, self._copies)
        python, cpu, *gpu = self._random
        random.setstate(python)
        torch.set_rng_state(cpu)
        for state in gpu:
            torch.cuda.set_rng_state(state, self._device)


def _flaw(loss: float) -> int:
    if math.isfinite(loss):
        return 0
    return _NAN if math.isnan(loss) else _INFINITE


def _placed(flaw: int, world: World) -> list[int]:
    return [flaw if rank == world.rank else 0 for rank in range(world.size)]


def _told(flaws: Sequence[int]) -> str:
    """
    >>> _told([0, 1, 0])
    'the loss of rank 1 is NaN'
    >>> _told([2, 0, 1])
    'the loss of ranks 0 and 2 is not finite'
    """
    ranks = [rank for rank, flaw in enumerate(flaws) if flaw]
    if not ranks:
        return "the gradients are not finite, though the loss of every rank is"
    kinds = {flaw for flaw in flaws if flaw}
    kind = {frozenset({_NAN}): "NaN", frozenset({_INFINITE}): "infinite"}.get(frozenset(kinds))
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"the loss of {word} {_listed(ranks)} is {kind or 'not finite'}"


def _listed(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers[:8]]
    if len(numbers) > len(shown):
        return f"{', '.join(shown)} and {len(numbers) - len(shown)} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
