"""Which part of this machine each worker has, written beside the worker, so that a controller that
starts anew counts as the one before it did. Blocking."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dtp_engine.backend import Capacity, Machine
from dtp_engine.jobs import Resources
from dtp_engine.local.folders import Home, WorkerFolder, read_json, write_json
from dtp_engine.local.machine import Gpu, Hardware
from dtp_engine.local.workers import find_agent

_LAUNCH_WITHIN_S = 60.0
"""A reservation whose worker was not started after so long was left by a crash."""


@dataclass(frozen=True, slots=True)
class Slot:
    cpus: float
    memory_bytes: int
    gpus: tuple[str, ...]
    """UUIDs."""


class Slots:
    """The reservations on one machine."""

    def __init__(self, home: Home, hardware: Hardware) -> None:
        self._home = home
        self._hardware = hardware
        self._gone: set[Path] = set()

    def reserve(self, folder: WorkerFolder, resources: Resources) -> Slot | None:
        """The worker's slot, the same when it is asked again; None when there are too few GPUs.

        Cores and memory are not refused here: the controller places only what fits.
        """
        mine = _read(folder)
        if mine is not None:
            return mine
        taken = {gpu for slot in self._taken() for gpu in slot.gpus}
        free = [gpu.uuid for gpu in self._hardware.gpus if gpu.uuid not in taken]
        if resources.gpus > len(free):
            return None
        slot = Slot(resources.cpus, resources.memory_bytes or 0, tuple(free[: resources.gpus]))
        folder.create()
        write_json(folder.reserved, asdict(slot))
        return slot

    def environment(self, slot: Slot) -> dict[str, str]:
        """Which devices a worker sees; nothing is said on a machine without any."""
        if not self._hardware.gpus:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)}

    def capacity(self) -> Capacity:
        taken = list(self._taken())
        hardware = self._hardware
        gpus: tuple[Gpu, ...] = hardware.gpus
        used_gpus = {uuid for slot in taken for uuid in slot.gpus} & {gpu.uuid for gpu in gpus}
        return Capacity(
            at=datetime.now(UTC),
            machines=(
                Machine(
                    name=hardware.name,
                    cpus=hardware.cpus,
                    memory_bytes=hardware.memory_bytes,
                    gpus=len(gpus),
                    gpu_name=gpus[0].name if gpus else "",
                ),
            ),
            free_cpus=max(0.0, hardware.cpus - sum(slot.cpus for slot in taken)),
            free_memory_bytes=max(0, hardware.memory_bytes - _memory(taken)),
            free_gpus=len(gpus) - len(used_gpus),
            largest=Resources(len(gpus), hardware.cpus, hardware.memory_bytes),
        )

    def _taken(self) -> Iterator[Slot]:
        for folder in self._home.all_workers():
            if folder.path in self._gone:
                continue
            if folder.gone.exists():
                self._gone.add(folder.path)
            elif (slot := _read(folder)) and _counts(folder):
                yield slot


def _read(folder: WorkerFolder) -> Slot | None:
    found = read_json(folder.reserved)
    if not {"cpus", "memory_bytes", "gpus"} <= found.keys():
        return None
    return Slot(float(found["cpus"]), int(found["memory_bytes"]), tuple(found["gpus"]))


def _counts(folder: WorkerFolder) -> bool:
    if folder.spawned.exists() or folder.claim.exists():
        return find_agent(folder) is not None
    return time.time() < folder.reserved.stat().st_mtime + _LAUNCH_WITHIN_S


def _memory(slots: Iterable[Slot]) -> int:
    return sum(slot.memory_bytes for slot in slots)
