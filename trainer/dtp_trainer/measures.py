"""The numbers of a record, each with a name. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dtp_trainer.wire import Host, Window

_GIB = 1 << 30
_HOST_FIELDS = tuple(field.name for field in dataclasses.fields(Host))


def measured(window: Window) -> dict[str, float]:
    """What the script reported under its own names, what dtp measured under ``speed/``, ``time/``
    and ``job/``."""
    speed = {"samples_per_s": window.samples_per_s, "tokens_per_s": window.tokens_per_s}
    return {
        **{name: float(value) for name, value in window.values.items()},
        **{f"speed/{name}": value for name, value in speed.items() if value is not None},
        **{f"time/{name}_ms": of["median"] * 1000 for name, of in window.phases.items()},
        "job/epoch": float(window.epoch),
        "job/generation": float(window.generation),
        "job/world_size": float(window.world_size),
    }


def used(host: Host) -> dict[str, float]:
    """Every number of a sample; of each GPU for itself, bytes as GiB.

    >>> used(Host(0.0, 1, 50.0, 1 << 30, 1 << 32, gpu_percent=(90.0, 80.0)))
    {'cpu_percent': 50.0, 'memory_gib': 1.0, 'gpu0_percent': 90.0, 'gpu1_percent': 80.0}
    """
    found: dict[str, float] = {}
    for name in _HOST_FIELDS:
        value = getattr(host, name)
        if name in ("at", "worker") or name.endswith("_total_bytes"):
            continue
        found |= _numbers(name, value)
    return found


def _numbers(name: str, value: object) -> Mapping[str, float]:
    if isinstance(value, (tuple, list)):
        rest = name.removeprefix("gpu_")
        pairs = [_numbers(f"gpu{number}_{rest}", one) for number, one in enumerate(value)]
        return {key: number for pair in pairs for key, number in pair.items()}
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return {}
    if name.endswith("_bytes"):
        return {f"{name.removesuffix('_bytes')}_gib": value / _GIB}
    return {name: float(value)}
