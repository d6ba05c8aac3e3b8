"""What a step makes of its device: floating-point operations a second, their share of what the
device could do, and the memory it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dtp_trainer.options import Compile, Options, Precision
from dtp_trainer.session.stop import SessionError

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from dtp_trainer.session.telemetry import Position

REPORT_EVERY_S = 1.0
"""The allocator takes 50 µs to tell of itself, and a single step's speed is mostly noise."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Of one GPU, dense, in TFLOP/s; 0 where it cannot compute so."""

    half: float
    """fp16 and bf16 on tensor cores, sums in fp32."""
    tf32: float
    fp32: float
    """Without tensor cores."""


PEAKS: tuple[tuple[str, Peak], ...] = (
    # NVIDIA's data sheets of each product; those that print figures "with sparsity" are halved.
    ("B200", Peak(2250, 1125, 75)),
    ("H200 NVL", Peak(835, 417, 60)),
    ("H200", Peak(989, 494, 67)),
    ("H100 NVL", Peak(835, 417, 60)),
    ("H100 PCIe", Peak(756, 378, 51)),
    ("H100", Peak(989, 494, 67)),
    ("A100", Peak(312, 156, 19.5)),
    ("A10G", Peak(70, 35, 31.5)),
    ("A10", Peak(125, 62.5, 31.2)),
    ("L40S", Peak(362, 183, 91.6)),
    ("L40", Peak(181, 90.5, 90.5)),
    ("L4", Peak(121, 60, 30.3)),
    ("T4", Peak(65, 0, 8.1)),
    ("V100-PCIE", Peak(112, 0, 14)),
    ("V100", Peak(125, 0, 15.7)),
    ("RTX 4090", Peak(165, 82.6, 82.6)),
)
"""By words of the names that the driver gives; the first that fits counts."""


def peak_tflops(device_name: str, precision: Precision, *, tf32: bool) -> float | None:
    """Of a GPU when it computes so; None for one that is not in the table.

    >>> peak_tflops("NVIDIA H100 80GB HBM3", Precision.BF16, tf32=False)
    989
    """
    words = f" {device_name.replace('-', ' ')} ".lower()
    for name, peak in PEAKS:
        if f" {name.replace('-', ' ')} ".lower() in words:
            full = peak.tf32 if tf32 and peak.tf32 else peak.fp32
            return (full if precision is Precision.FP32 else peak.half) or None
    return None


class Efficiency:
    """Of one rank; `ended` after each step gives what is due to be reported."""

    def __init__(self, device: torch.device, world_size: int, options: Options) -> None:
        self._device, self._world_size, self._options = device, world_size, options
        self._per_sample = self._per_token = 0.0
        self._per_step = 0.0
        """Of all ranks, as counted."""
        self._peak_tflops: float | None = None
        self._counter: FlopCounterMode | None = None
        self._count = False
        self._flops = self._seconds = 0.0
        self._told_at = time.perf_counter()

    def expect(
        self, per_sample: float | None, per_token: float | None, precision: Precision | None
    ) -> None:
        """With neither number: count those of the next step but one.

        Raises `SessionError` where they cannot be counted.
        """
        self._per_sample, self._per_token = per_sample or 0.0, per_token or 0.0
        self._count = per_sample is None and per_token is None
        if self._count and self._options.compile is not Compile.OFF:
            raise SessionError(
                "session.flops() cannot look into compiled code; give per_sample= or per_token="
            )
        if self._device.type == "cuda":
            self._peak_tflops = peak_tflops(
                torch.cuda.get_device_name(self._device),
                precision or self._options.precision,
                tf32=torch.get_float32_matmul_precision() != "highest",
            )

    def ended(self, position: Position, step_s: float) -> dict[str, float]:
        """``tflops`` (a second and device), ``mfu`` where the device's peak is known, and on a GPU
        ``peak_memory_bytes``; empty until a second after the last."""
        if self._counted():
            return {}
        self._flops += (
            self._per_sample * position.samples
            + self._per_token * (position.tokens or 0)
            + self._per_step
        )
        self._seconds += step_s
        now = time.perf_counter()
        if now - self._told_at < REPORT_EVERY_S or self._seconds <= 0:
            return {}
        self._told_at = now
        told = self._speed() | self._memory()
        self._flops = self._seconds = 0.0
        return told

    def _speed(self) -> dict[str, float]:
        if not self._flops:
            return {}
        tflops = self._flops / self._seconds / self._world_size / 1e12
        told = {"tflops": float(f"{tflops:.4g}")}
        if self._peak_tflops:
            told["mfu"] = round(tflops / self._peak_tflops, 4)
        return told

    def _memory(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {}
        return {"peak_memory_bytes": float(torch.cuda.max_memory_allocated(self._device))}

    def _counted(self) -> bool:
        """Whether the step that ended was the one counted, whose time says nothing."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._per_step = float(self._counter.get_total_flops() * self._world_size)
            self._counter = None
            return True
        if self._count:
            from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 - 0.2 s, rare

            self._count = False
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]
        return False
