"""What NVML tells of a worker's GPUs: how busy, how full, how warm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

Readings = tuple[float | None, ...]
"""A number a GPU; None for one without this sensor; empty when none has it."""

# Constants of NVML's interface, which `nvml.h` numbers for good.
_CORE_TEMPERATURE = 0
_SM_CLOCK = 1
_PCIE_SENT, _PCIE_RECEIVED = 0, 1


@dataclass(frozen=True, slots=True)
class Gpus:
    """Of one moment; empty when there are none or NVML does not answer."""

    percent: tuple[float, ...] = ()
    memory_bytes: tuple[int, ...] = ()
    memory_total_bytes: tuple[int, ...] = ()
    watts: Readings = ()
    celsius: Readings = ()
    sm_mhz: Readings = ()
    pcie_rx_bytes_per_s: Readings = ()
    pcie_tx_bytes_per_s: Readings = ()


def open_gpus(visible: str | None) -> tuple[Any, list[Any]]:
    """The driver's library and handles of the GPUs that ``CUDA_VISIBLE_DEVICES`` names (None: of
    all). Raises whatever the library does where there is no driver."""
    import pynvml  # noqa: PLC0415 - absent in a bare image, and its driver library is slow to load

    pynvml.nvmlInit()
    if visible is None:
        numbers: Iterable[int] = range(pynvml.nvmlDeviceGetCount())
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
    names = [name.strip() for name in visible.split(",")]
    return pynvml, [_handle(pynvml, name) for name in names if name]


def _handle(nvml: Any, name: str) -> Any:
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def read_gpus(nvml: Any, handles: Sequence[Any]) -> Gpus:
    """Each number by itself: what a card, or its driver, does not tell is left out alone.

    Takes about 40 ms a card: the driver measures the PCIe traffic of two times 20 ms.
    """
    memory = _of_all(nvml.nvmlDeviceGetMemoryInfo, handles)
    usage = _of_all(nvml.nvmlDeviceGetUtilizationRates, handles)
    return Gpus(
        percent=tuple(float(rates.gpu) for rates in usage),
        memory_bytes=tuple(int(info.used) for info in memory),
        memory_total_bytes=tuple(int(info.total) for info in memory),
        watts=_readings(lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000, handles),
        celsius=_readings(
            lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, _CORE_TEMPERATURE), handles
        ),
        sm_mhz=_readings(lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, _SM_CLOCK), handles),
        pcie_rx_bytes_per_s=_readings(
            lambda gpu: nvml.nvmlDeviceGetPcieThroughput(gpu, _PCIE_RECEIVED) * 1024, handles
        ),
        pcie_tx_bytes_per_s=_readings(
            lambda gpu: nvml.nvmlDeviceGetPcieThroughput(gpu, _PCIE_SENT) * 1024, handles
        ),
    )


def _readings(read: Callable[[Any], float], handles: Sequence[Any]) -> Readings:
    found = [_or_none(read, handle) for handle in handles]
    known = [None if value is None else float(value) for value in found]
    return tuple(known) if any(value is not None for value in known) else ()


def _of_all(read: Callable[[Any], T], handles: Sequence[Any]) -> list[T]:
    """Empty unless every card tells it."""
    found = [value for handle in handles if (value := _or_none(read, handle)) is not None]
    return found if len(found) == len(handles) else []


def _or_none(read: Callable[[Any], T], handle: Any) -> T | None:
    try:
        return read(handle)
    except Exception:  # noqa: BLE001 - NVML's own errors, or a function that this library lacks
        return None
