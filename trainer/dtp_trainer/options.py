"""How a step is computed: the ``training`` block of a job file, and `Session(options=…)`.

Standard library only: the engine checks a job file with the same class by which a rank reads it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dtp_trainer.wire import Env


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    """Autocast; the range of fp32, so gradients need no scaling."""
    FP16 = "fp16"
    """Autocast with a gradient scaler, which is part of the checkpoint."""


class Compile(StrEnum):
    OFF = "off"
    DEFAULT = "default"
    REDUCE_OVERHEAD = "reduce-overhead"
    MAX_AUTOTUNE = "max-autotune"


class CommHook(StrEnum):
    """What gradients are compressed to while they travel."""

    OFF = "off"
    FP16 = "fp16"
    BF16 = "bf16"
    POWERSGD = "powersgd"


class Shard(StrEnum):
    """What a rank keeps only its part of."""

    NOTHING = "nothing"
    OPTIMIZER = "optimizer"
    """ZeRO stage 1: a rank holds and steps the optimizer's state of its share of the parameters."""
    EVERYTHING = "everything"
    """FSDP2: parameters, gradients and optimizer state; the way past one GPU's memory."""


class NonFinite(StrEnum):
    """What to do when a loss or gradient is NaN or infinite."""

    IGNORE = "ignore"
    STOP = "stop"
    """End the job before the weights are touched, naming step and rank."""
    SKIP = "skip"
    """Leave this step's update out."""
    ROLLBACK = "rollback"
    """Go back to the newest checkpoint and leave the step out when it comes again."""


_FORGIVING = (NonFinite.SKIP, NonFinite.ROLLBACK)


_OF_DDP = {"bucket_mb", "static_graph", "gradient_as_bucket_view", "comm_hook"}


@dataclass(frozen=True, slots=True)
class Options:
    """The defaults change nothing of what the plain script computes."""

    precision: Precision = Precision.FP32
    compile: Compile = Compile.OFF
    accumulate: int = 1
    """Parts in which a rank computes its share of a batch, one after the other."""
    clip_grad_norm: float | None = None
    """Largest 2-norm of all gradients together."""
    bucket_mb: float | None = None
    """Of DDP's gradient buckets, MiB; None: torch's own choice (25)."""
    static_graph: bool = False
    gradient_as_bucket_view: bool = False
    comm_hook: CommHook = CommHook.OFF
    powersgd_rank: int = 1
    shard: Shard = Shard.NOTHING
    fused_optimizer: bool = False
    activation_checkpointing: bool = False
    channels_last: bool = False
    prefetch: int = 2
    """Batches fetched, and moved to the device, ahead of the step."""
    non_finite: NonFinite = NonFinite.IGNORE

    def __post_init__(self) -> None:
        """Raises ValueError, in one line that names the field."""
        for name, least in (("accumulate", 1), ("powersgd_rank", 1), ("prefetch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, found {getattr(self, name)}")
        for name in ("clip_grad_norm", "bucket_mb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: must be more than 0, found {value}")
        if self.comm_hook is CommHook.POWERSGD and self.non_finite in _FORGIVING:
            raise ValueError(
                f"non_finite: {self.non_finite} cannot undo what comm_hook: powersgd remembers of "
                "gradients; use stop"
            )
        if self.comm_hook is CommHook.POWERSGD and self.precision is Precision.FP16:
            raise ValueError(
                "comm_hook: powersgd does not go with precision: fp16: what it remembers of a step "
                "that overflowed would spoil all later ones; use bf16"
            )

        if self.shard is Shard.EVERYTHING:
            self._check_without_ddp()

    def _check_without_ddp(self) -> None:
        chosen = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        for name in sorted(chosen & _OF_DDP):
            raise ValueError(f"{name}: is of DDP, which shard: everything does without")
        if self.channels_last:
            raise ValueError("channels_last: does not go with shard: everything, which cuts rows")

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        plain = type(self)()
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in named if value != getattr(plain, name)}

    def replaced_by(self, values: Mapping[str, Any]) -> Options:
        """With other values for some fields, as `to_dict` writes them. Raises ValueError."""
        known = {f.name: f for f in dataclasses.fields(self)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown; there are {', '.join(known)}")
        kinds = {name: type(getattr(type(self)(), name)) for name in values}
        read = {
            name: kinds[name](value) if issubclass(kinds[name], StrEnum) else value
            for name, value in values.items()
        }
        return dataclasses.replace(self, **read)


def of_job(given: Options | None = None) -> Options:
    """The script's own choice, where the job file says nothing else.

    Raises ValueError when the environment holds something else than options.
    """
    return (given or Options()).replaced_by(json.loads(os.environ.get(Env.OPTIONS) or "{}"))
