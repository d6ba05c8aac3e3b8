"""Promises of a rank's step records, and of the loader that it waits for."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dtp_trainer import wire
from dtp_trainer.session.loader import Loader
from dtp_trainer.session.telemetry import Position, Telemetry
from dtp_trainer.session.transport import Transport, each_tensor

FIVE = Position(step=5, epoch=0.5, total_steps=10, samples=12)


@pytest.fixture
def steps_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "steps.jsonl"
    monkeypatch.setenv(wire.Env.STEPS_FILE, str(path))
    monkeypatch.setenv(wire.Env.GENERATION, "3")
    return path


def records(path: Path) -> list[wire.Step | None]:
    return [wire.parse_step(line) for line in path.read_text().splitlines()]


def test_a_record_is_there_as_soon_as_its_step_ends(steps_file: Path) -> None:
    """A kill right after a step loses nothing: the line is in the file, whole."""
    telemetry = Telemetry(1, 2)
    telemetry.sample({"loss": torch.tensor(0.5, requires_grad=True), "lr": 0.1})
    telemetry.step(FIVE, {"step": 0.025})
    (record,) = records(steps_file)
    assert record is not None
    assert (record.rank, record.world_size, record.generation, record.step) == (1, 2, 3, 5)
    assert dict(record.values) == {"loss": 0.5, "lr": 0.1}
    assert dict(record.seconds) == {"step": 0.025}
    telemetry.close()


def test_numbers_that_are_not_finite_pass_through(steps_file: Path) -> None:
    """NaN and infinity are reported as they are."""
    telemetry = Telemetry(0, 1)
    telemetry.sample({"loss": math.nan, "norm": torch.tensor(math.inf)})
    telemetry.step(FIVE, {"step": 1.0})
    (record,) = records(steps_file)
    assert record is not None
    assert math.isnan(record.values["loss"])
    assert record.values["norm"] == math.inf
    telemetry.close()


def test_what_is_logged_comes_with_the_next_step_or_at_the_end(steps_file: Path) -> None:
    """Values between steps are in the next record; after the last one in a record of their own,
    of the same step and without seconds."""
    telemetry = Telemetry(0, 1)
    telemetry.keep({"accuracy": 0.9})
    telemetry.step(FIVE, {"step": 1.0})
    telemetry.keep({"accuracy": 0.95})
    telemetry.close()
    first, last = records(steps_file)
    assert first is not None
    assert last is not None
    assert dict(first.values) == {"accuracy": 0.9}
    assert (last.step, dict(last.values), dict(last.seconds)) == (5, {"accuracy": 0.95}, {})


def test_a_value_that_is_no_number_is_named(steps_file: Path) -> None:
    """The error says which value was wrong."""
    telemetry = Telemetry(0, 1)
    with pytest.raises(TypeError, match=r"loss=.*neither a number nor a tensor of one element"):
        telemetry.sample({"loss": torch.zeros(2)})
    telemetry.close()


def test_a_full_disk_costs_the_metrics_of_its_time_and_not_the_training(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once, in one line; once there is room the next steps are reported again."""
    path, ballast = small_disk / "steps.jsonl", small_disk / "ballast"
    monkeypatch.setenv(wire.Env.STEPS_FILE, str(path))
    telemetry = Telemetry(0, 1)
    fill(ballast)
    for _ in range(100):
        telemetry.step(FIVE, {})
    ballast.unlink()
    telemetry.step(dataclasses.replace(FIVE, step=6), {})
    telemetry.close()
    said = capsys.readouterr().err
    assert said.startswith("dtp: steps of rank 0 are not reported while this lasts: No space left")
    assert said.count("\n") == 1
    last = records(path)[-1]
    assert last is not None
    assert last.step == 6


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


class Squares:
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        if index > 50:
            raise LookupError(f"no square of {index}")
        return index * index


class Together(Squares):
    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return torch.tensor(indices) ** 2


def order(*batches: list[int]) -> Iterator[np.ndarray]:
    return (np.array(batch) for batch in batches)


@pytest.mark.parametrize("dataset", [Squares(), Together()])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_loader_gives_the_batches_in_order(dataset: Squares, ahead: int) -> None:
    """With and without its thread, by sample or by batch."""
    loader = Loader(dataset, order([1, 2], [3, 4], [5, 6]), ahead=ahead)
    assert [batch.tolist() for batch in loader] == [[1, 4], [9, 16], [25, 36]]
    loader.close()


def test_an_error_of_the_dataset_is_raised_where_its_batch_is_asked_for() -> None:
    """The batches before it are still given."""
    loader = Loader(Squares(), order([1], [99], [2]))
    assert next(loader).tolist() == [1]
    with pytest.raises(LookupError, match="no square of 99"):
        next(loader)
    loader.close()


def test_a_closed_loader_leaves_no_thread() -> None:
    """Closing in the middle ends the thread, though it was waiting to hand a batch over."""
    loader = Loader(Squares(), order(*[[1]] * 20))
    next(loader)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "dtp-loader"]


def test_tensors_are_moved_wherever_they_are_in_a_batch() -> None:
    """Tuples, lists and dicts keep their shape; other things stay as they are."""
    batch = {"x": (torch.zeros(1), [torch.zeros(2)]), "name": "a"}
    moved = each_tensor(batch, lambda tensor: tensor.to("meta"))
    assert moved["x"][0].is_meta
    assert moved["x"][1][0].is_meta
    assert moved["name"] == "a"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_device_whole() -> None:
    """Copied in a stream of their own, from a thread, while the device is busy; their memory is not
    used again before the step that has them."""
    device = torch.device("cuda", 0)
    transport = Transport(device)
    loader = Loader(Together(), order(*[[n, n] for n in range(200)]), send=transport.send)
    busy = torch.randn(2000, 2000, device=device)
    sums = []
    for sent in loader:
        batch = transport.receive(sent)
        busy = busy @ busy / 2000
        sums.append(batch.sum())
    assert [int(total) for total in sums] == [2 * n * n for n in range(200)]
    loader.close()
