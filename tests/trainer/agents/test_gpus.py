"""What NVML tells of GPUs. The library is a stand-in: no test may depend on a card."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dtp_trainer.worker.gpus import Gpus, read_gpus


class Driver:
    """Of cards that are dicts of what their sensors say, in NVML's units."""

    def nvmlDeviceGetMemoryInfo(self, card: Any) -> Any:  # noqa: N802
        return SimpleNamespace(used=card["used"], total=card["total"])

    def nvmlDeviceGetUtilizationRates(self, card: Any) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=card["percent"])

    def nvmlDeviceGetPowerUsage(self, card: Any) -> int:  # noqa: N802
        return int(card["milliwatts"])

    def nvmlDeviceGetTemperature(self, card: Any, sensor: int) -> int:  # noqa: N802
        return int(card["celsius"][sensor])

    def nvmlDeviceGetClockInfo(self, card: Any, clock: int) -> int:  # noqa: N802
        return int(card["mhz"][clock])

    def nvmlDeviceGetPcieThroughput(self, card: Any, counter: int) -> int:  # noqa: N802
        return int(card["kib_per_s"][counter])


CARD = {
    "used": 5,
    "total": 10,
    "percent": 90,
    "milliwatts": 350_500,
    "celsius": {0: 61},
    "mhz": {0: 1, 1: 1980, 2: 3},
    "kib_per_s": {0: 2, 1: 8},
}


def test_all_sensors_of_a_card() -> None:
    """In watts, degrees Celsius, megahertz and bytes a second."""
    assert read_gpus(Driver(), [CARD]) == Gpus(
        (90.0,), (5,), (10,), (350.5,), (61.0,), (1980.0,), (8192.0,), (2048.0,)
    )


def test_a_card_without_a_sensor_loses_that_number_only() -> None:
    """The other numbers, and the other card's, stay; a sensor that no card has is left out."""
    passive = {name: value for name, value in CARD.items() if name not in ("milliwatts", "mhz")}
    fanless = {name: value for name, value in CARD.items() if name != "mhz"}
    found = read_gpus(Driver(), [fanless, passive])
    assert found.watts == (350.5, None)
    assert found.sm_mhz == ()
    assert found.percent == (90.0, 90.0)
    assert found.celsius == (61.0, 61.0)


def test_a_part_of_a_card_tells_its_memory() -> None:
    """One that is divided (MIG) has no utilization of its own."""
    part = {"used": 5, "total": 10}
    assert read_gpus(Driver(), [part]) == Gpus(memory_bytes=(5,), memory_total_bytes=(10,))


def test_an_older_library_is_enough() -> None:
    """Functions that it lacks cost their numbers, and nothing else."""

    class Old:
        nvmlDeviceGetMemoryInfo = Driver.nvmlDeviceGetMemoryInfo  # noqa: N815
        nvmlDeviceGetUtilizationRates = Driver.nvmlDeviceGetUtilizationRates  # noqa: N815

    assert read_gpus(Old(), [CARD]) == Gpus((90.0,), (5,), (10,))
