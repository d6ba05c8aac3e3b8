"""This machine: the cores, memory and GPUs that dtp may give to workers."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Gpu:
    uuid: str
    """As ``CUDA_VISIBLE_DEVICES`` takes it, whatever the order of devices."""
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    name: str
    cpus: float
    memory_bytes: int
    gpus: tuple[Gpu, ...]


def read_hardware(environ: Mapping[str, str] = os.environ) -> Hardware:
    """What this process may use: affinity, cgroup limits and ``CUDA_VISIBLE_DEVICES`` respected."""
    return Hardware(
        platform.node() or "localhost", _cpus(), _memory_bytes(), tuple(_visible(environ))
    )


def _cpus() -> float:
    allowed = float(len(os.sched_getaffinity(0)))
    return min([allowed, *_quota_v2(), *_quota_v1()])


def _quota_v2() -> Iterator[float]:
    for folder in _cgroup_folders():
        quota, _, period = _line(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)


def _quota_v1() -> Iterator[float]:
    quota = _line(_CGROUP / "cpu/cpu.cfs_quota_us")
    period = _line(_CGROUP / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(quota) > 0:
        yield int(quota) / int(period)


def _memory_bytes() -> int:
    limits = [_line(folder / "memory.max") for folder in _cgroup_folders()]
    limits.append(_line(_CGROUP / "memory/memory.limit_in_bytes"))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *(int(x) for x in limits if x.isdigit())])


def _cgroup_folders() -> list[Path]:
    """Of this process and of those above it: the tightest limit holds."""
    own = _line(Path("/proc/self/cgroup"), starting="0::").removeprefix("0::").lstrip("/")
    leaf = _CGROUP / own
    return [folder for folder in (leaf, *leaf.parents) if folder.is_relative_to(_CGROUP)]


def _line(path: Path, *, starting: str = "") -> str:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(starting):
                return line
    return ""


def _visible(environ: Mapping[str, str]) -> list[Gpu]:
    found = _nvml_gpus()
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return found
    wanted = [name.strip() for name in named.split(",") if name.strip()]
    chosen = [_named(found, name) for name in wanted]
    return [gpu for gpu in chosen if gpu]


def _named(found: list[Gpu], name: str) -> Gpu | None:
    if name.isdigit():
        return found[int(name)] if int(name) < len(found) else None
    return next((gpu for gpu in found if gpu.uuid.startswith(name)), None)


def _nvml_gpus() -> list[Gpu]:
    """Empty where there is no driver."""
    import pynvml  # noqa: PLC0415 - a tenth of a second with a driver; asked for once

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [
            Gpu(
                pynvml.nvmlDeviceGetUUID(handle),
                pynvml.nvmlDeviceGetName(handle),
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        ]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
