"""What a step makes of its device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dtp_trainer import wire
from dtp_trainer.options import Compile, Options, Precision
from dtp_trainer.session import Session, efficiency
from dtp_trainer.session.efficiency import Efficiency, peak_tflops
from dtp_trainer.session.stop import SessionError
from dtp_trainer.session.telemetry import Position

CPU = torch.device("cpu")


def position(step: int) -> Position:
    return Position(step=step, epoch=0.0, total_steps=None, samples=8, tokens=800)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "REPORT_EVERY_S", 0.0)


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tflops"),
    [
        ("NVIDIA H200", Precision.BF16, False, 989),
        ("NVIDIA H200 NVL", Precision.BF16, False, 835),
        ("NVIDIA H100 80GB HBM3", Precision.FP16, False, 989),
        ("NVIDIA H100 PCIe", Precision.BF16, False, 756),
        ("NVIDIA A100-SXM4-80GB", Precision.FP32, True, 156),
        ("NVIDIA A100-SXM4-80GB", Precision.FP32, False, 19.5),
        ("NVIDIA A10G", Precision.BF16, False, 70),
        ("NVIDIA A10", Precision.BF16, False, 125),
        ("NVIDIA L40S", Precision.BF16, False, 362),
        ("NVIDIA L4", Precision.BF16, False, 121),
        ("Tesla T4", Precision.FP32, True, 8.1),
        ("Tesla V100-SXM2-16GB", Precision.FP16, False, 125),
        ("Tesla V100-PCIE-32GB", Precision.FP16, False, 112),
        ("NVIDIA GH999", Precision.BF16, False, None),
        ("NVIDIA L400", Precision.BF16, False, None),
    ],
)
def test_peak_of_a_gpu(name: str, precision: Precision, tf32: bool, tflops: float | None) -> None:
    """By the driver's name of it; one that is not known has none, not another's."""
    assert peak_tflops(name, precision, tf32=tf32) == tflops


def test_speed_is_of_one_device() -> None:
    """Operations of the global batch over the time of the step and the number of ranks; a CPU has
    no peak, so no share of one."""
    told = Efficiency(CPU, 4, Options())
    told.expect(per_sample=1e12, per_token=None, precision=None)
    assert told.ended(position(1), step_s=0.5) == {"tflops": 4.0}
    told.expect(per_sample=None, per_token=1e10, precision=None)
    assert told.ended(position(2), step_s=0.5) == {"tflops": 4.0}


def test_nobody_asked() -> None:
    """Without a number of operations nothing is told of them."""
    assert Efficiency(CPU, 1, Options()).ended(position(1), step_s=0.5) == {}


def test_operations_of_a_step_are_counted_once() -> None:
    """Forward and backward of a linear layer are 6 operations a weight and sample, less the two
    for a gradient of the input that nobody needs; the counted step's time is left out."""
    layer = nn.Linear(32, 16, bias=False)
    told = Efficiency(CPU, 2, Options())
    told.expect(None, None, None)
    assert told.ended(position(1), step_s=1.0) == {}
    layer(torch.ones(8, 32)).sum().backward()
    assert told.ended(position(2), step_s=99.0) == {}
    found = told.ended(position(3), step_s=1e-6)
    assert found["tflops"] == pytest.approx(4 * 32 * 16 * 8 / 1e-6 / 1e12, rel=1e-3)


def test_compiled_code_cannot_be_counted() -> None:
    """It is said at once, with what to do instead."""
    told = Efficiency(CPU, 1, Options(compile=Compile.DEFAULT))
    with pytest.raises(SessionError, match="per_sample="):
        told.expect(None, None, None)


def test_a_session_reports_what_it_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`session.flops()` is all that a script needs; every phase of a step is told beside it."""
    path = tmp_path / "steps.jsonl"
    monkeypatch.setenv(wire.Env.STEPS_FILE, str(path))
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Session(model=model, optimizer=optimizer) as running:
        ddp = running.ddp(model)
        running.flops()
        for batch in running.batches(torch.ones(20, 1), global_batch=5, epochs=2):
            ddp(batch).square().sum().backward()
            optimizer.step()
            running.step()
    last = wire.parse_step(path.read_text().splitlines()[-1])
    assert last is not None
    assert last.values["tflops"] > 0
    own = {"data", "h2d", "forward", "backward", "optimizer", "other"}
    assert own < set(last.seconds)
    assert sum(last.seconds[name] for name in own) == pytest.approx(last.seconds["step"])
