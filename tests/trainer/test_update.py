"""Promises of `session.optimize`, in one process; with more ranks: `test_guard`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dtp_trainer import wire
from dtp_trainer.options import NonFinite, Options, Precision
from dtp_trainer.session import Session
from dtp_trainer.session.parts import parts

STEPS, LR = 12, 1e-2


class Pair(NamedTuple):
    x: Tensor
    label: Tensor


@pytest.fixture(autouse=True)
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sessions of a test report."""
    path = tmp_path / "steps.jsonl"
    monkeypatch.setenv(wire.Env.STEPS_FILE, str(path))
    return path


def records(steps: Path) -> list[wire.Step]:
    return [step for step in map(wire.parse_step, steps.read_text().splitlines()) if step]


def data() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [(x, int(x[0] > 0)) for x in torch.randn(96, 8, generator=generator)]


def trained(options: Options | None = None, *, factor: float = 1.0) -> list[float]:
    """The losses of a small model; without options by a plain loop."""
    model, optimizer = fresh()
    losses = []
    with Session(model=model, optimizer=optimizer, options=options) as session:
        for batch in session.batches(data(), global_batch=24, steps=STEPS):
            loss = (session.optimize if options else plain(optimizer))(
                lambda part: factor * functional.cross_entropy(model(part[0]), part[1]), batch
            )
            losses.append(loss.item())
            session.step(loss=loss)
    return losses


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=LR)


def plain(optimizer: torch.optim.Optimizer) -> Callable[[Callable[[Any], Tensor], Any], Tensor]:
    def step(loss_of: Callable[[Any], Tensor], batch: Any) -> Tensor:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def test_without_options_it_is_the_plain_loop() -> None:
    """Every loss is the same to the bit."""
    assert trained(Options()) == trained()


@pytest.mark.parametrize("count", [2, 5, 24, 100])
def test_parts_have_the_mean_of_the_whole(count: int) -> None:
    """Also where parts differ in size, and where there are fewer samples than parts."""
    assert trained(Options(accumulate=count)) == pytest.approx(trained(), abs=1e-5)


@pytest.mark.parametrize(("precision", "within"), [(Precision.BF16, 1e-2), (Precision.FP16, 2e-3)])
def test_precision_changes_losses_by_rounding_only(precision: Precision, within: float) -> None:
    """And does change them: the forward pass is computed in that type."""
    losses = trained(Options(precision=precision))
    assert losses == pytest.approx(trained(), abs=within)
    assert losses != trained()


@pytest.mark.parametrize("guard", [NonFinite.IGNORE, NonFinite.STOP])
def test_an_overflow_halves_the_scale_and_leaves_the_update_out(guard: NonFinite) -> None:
    """fp16 gradients beyond its range are the scaler's business, not the guard's."""
    model, optimizer = fresh()
    before = model[0].weight.detach().clone()
    options = Options(precision=Precision.FP16, non_finite=guard)
    with Session(model=model, optimizer=optimizer, options=options) as session:
        for batch in session.batches(data(), global_batch=24, steps=20):
            loss = session.optimize(lambda part: 1e3 * model(part[0]).square().mean(), batch)
            session.step(loss=loss)
            if session.global_step == 1:
                assert torch.equal(before, model[0].weight)
    assert not torch.equal(before, model[0].weight)


def test_clipping_bounds_the_norm_of_all_gradients_together(steps: Path) -> None:
    """As `clip_grad_norm_` does; what is reported is the norm before."""
    model, _ = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    options = Options(clip_grad_norm=1e-3)
    with Session(model=model, optimizer=optimizer, options=options) as session:
        for batch in session.batches(data(), global_batch=24, steps=1):
            session.optimize(lambda part: model(part[0]).square().mean(), batch)
            session.step()
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    assert float(nn.utils.get_total_norm(moved)) == pytest.approx(1e-3, rel=1e-2)
    assert records(steps)[0].values["grad_norm"] > 0.1


def test_rate_and_norm_are_reported_and_the_schedule_goes_on(steps: Path) -> None:
    """The rate of a step is the one that it was taken with."""
    model, optimizer = fresh()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    with Session(model=model, optimizer=optimizer, scheduler=scheduler) as session:
        for batch in session.batches(data(), global_batch=24, steps=3):
            session.step(loss=session.optimize(lambda part: model(part[0]).mean(), batch))
    assert [r.values["lr"] for r in records(steps)] == pytest.approx([LR, LR / 2, LR / 4])
    assert "grad_norm" in records(steps)[0].values


def test_a_schedule_that_goes_by_a_metric_is_the_scripts_own() -> None:
    """It is kept in checkpoints and left alone otherwise."""
    model, optimizer = fresh()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with Session(model=model, optimizer=optimizer, scheduler=scheduler) as session:
        for batch in session.batches(data(), global_batch=24, steps=1):
            session.step(loss=session.optimize(lambda part: model(part[0]).mean(), batch))
    assert scheduler.last_epoch == 0


@pytest.mark.parametrize(
    "chosen",
    [{"precision": "bf16"}, {"accumulate": 2}, {"clip_grad_norm": 1.0}, {"non_finite": "skip"}],
)
def test_options_that_a_plain_loop_cannot_have_end_it_at_the_first_step(
    chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never ignored in silence: one line that names the option and what to call."""
    monkeypatch.setenv(wire.Env.OPTIONS, json.dumps(chosen))
    with pytest.raises(SystemExit, match=rf"^dtp: training.{next(iter(chosen))} .*optimize"):
        trained()


def test_options_that_mean_nothing_end_the_script_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is trained."""
    monkeypatch.setenv(wire.Env.OPTIONS, '{"accumulate": 0}')
    with pytest.raises(SystemExit, match=r"^dtp: training.accumulate: must be at least 1"):
        trained()


def test_a_job_files_options_overrule_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it does not name stay the script's."""
    monkeypatch.setenv(wire.Env.OPTIONS, '{"accumulate": 3}')
    model, optimizer = fresh()
    options = Options(accumulate=2, clip_grad_norm=1.0)
    with Session(model=model, optimizer=optimizer, options=options) as session:
        assert session.options == Options(accumulate=3, clip_grad_norm=1.0)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_out_of_memory_is_one_line_that_helps(error: Exception) -> None:
    """Which rank, in which step, and what is not in use yet that would help."""

    def hungry(_: Any) -> Tensor:
        raise error

    model, optimizer = fresh()
    session = Session(model=model, optimizer=optimizer, options=Options(accumulate=2))
    batch = next(session.batches(data(), global_batch=24, steps=1))
    with pytest.raises(SystemExit, match=r"^dtp: rank 0 ran out of memory .*step 1.*accumulate: 4"):
        session.optimize(hungry, batch)
    session.finish()


def test_an_error_of_the_model_passes_through() -> None:
    """It is the script's own, traceback and all."""
    model, optimizer = fresh()
    session = Session(model=model, optimizer=optimizer)
    batch = next(session.batches(data(), global_batch=24, steps=1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        session.optimize(lambda part: model(part[0][:, :3]).mean(), batch)
    session.finish()


def test_a_batch_is_split_through_and_through() -> None:
    """Tensors in tuples, lists, dicts and named tuples; what is no sample goes everywhere."""
    x = torch.arange(5)
    batch = {"pair": Pair(x, x + 1), "list": [x.unsqueeze(1)], "name": "a", "scale": torch.ones(())}
    found = list(parts(batch, 2))
    assert [weight for _, weight in found] == [0.4, 0.6]
    assert [part["pair"].label.tolist() for part, _ in found] == [[1, 2], [3, 4, 5]]
    assert [part["list"][0].shape for part, _ in found] == [(2, 1), (3, 1)]
    assert {(part["name"], part["scale"].item()) for part, _ in found} == {("a", 1.0)}


@pytest.mark.parametrize("batch", ["text", [torch.ones(2), torch.ones(3)], torch.ones(())])
def test_a_batch_that_cannot_be_split_is_refused(batch: Any) -> None:
    """Its tensors must have one number of samples."""
    with pytest.raises(ValueError, match="one number of samples"):
        list(parts(batch, 2))
    assert [part for part, _ in parts(batch, 1)] == [batch]
