"""What a simulated job reports: loss, accuracy, learning rate, speed. Pure functions of a step."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the script of a simulated job behaves."""

    steps: int = 2000
    step_s: float = 0.4
    """Of one worker alone."""
    global_batch: int = 256
    steps_per_epoch: int = 200
    tokens_per_sample: int | None = None
    scaling: float = 0.93
    """Efficiency of each doubling of the workers; 1 is linear."""
    fails_at: tuple[int, ...] = ()
    """Steps at which a rank fails, each once."""
    always_fails_at: int | None = None
    """A step that no attempt gets past."""
    hangs_at: tuple[int, ...] = ()
    reports_steps: bool = True
    """False: a script that knows nothing of dtp."""
    seed: int = 0


def seconds_a_step(behaviour: Behaviour, world_size: int) -> float:
    doublings = math.log2(max(world_size, 1))
    return behaviour.step_s / (max(world_size, 1) * math.pow(behaviour.scaling, doublings))


def values(behaviour: Behaviour, step: int) -> Mapping[str, float]:
    """
    >>> early, late = values(Behaviour(), 10), values(Behaviour(), 1900)
    >>> early["loss"] > late["loss"] and early["accuracy"] < late["accuracy"]
    True
    """
    share = step / behaviour.steps
    fast = math.exp(-share * 14)
    slow = math.exp(-share * 2.5)
    loss = 0.12 + 1.7 * fast + 0.5 * slow + noise(behaviour.seed, step) * (0.02 + 0.08 * slow)
    accuracy = 0.982 - 0.75 * fast - 0.14 * slow + noise(behaviour.seed + 1, step) * 0.012
    warm_up = min(step / max(behaviour.steps * 0.04, 1), 1.0)
    rate = 3e-3 * warm_up * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return {
        "loss": round(max(loss, 0.01), 5),
        "accuracy": round(min(max(accuracy, 0.0), 1.0), 5),
        "lr": round(rate, 8),
    }


def noise(seed: int, step: int) -> float:
    """Between -1 and 1, the same for the same arguments."""
    return zlib.crc32(f"{seed}/{step}".encode()) / 0x7FFFFFFF - 1.0


def samples_per_s(behaviour: Behaviour, world_size: int, step: int) -> float:
    speed = behaviour.global_batch / seconds_a_step(behaviour, world_size)
    return speed * (1 + 0.03 * noise(behaviour.seed + 2, step))


def data_wait(behaviour: Behaviour, step: int) -> float:
    """Share of the step time spent waiting for data."""
    return 0.04 + 0.03 * (1 + noise(behaviour.seed + 3, step))


def phases(behaviour: Behaviour, world_size: int, step: int) -> Mapping[str, float]:
    """Phase → share of the step; the more ranks, the more of it is communication.

    >>> sum(phases(Behaviour(), 4, 100).values())
    1.0
    """
    data, comm = data_wait(behaviour, step), 0.03 * math.log2(max(world_size, 1))
    rest = 1 - data - comm
    shares = {"data": data, "forward": 0.3 * rest, "backward": 0.6 * rest, "optimizer": 0.08 * rest}
    if world_size > 1:
        shares["comm"] = comm
    return {**shares, "other": 1 - sum(shares.values())}
