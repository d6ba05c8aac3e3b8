"""Step records of ranks become windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtp_trainer.wire import Step, encode_step
from dtp_trainer.worker import folding
from dtp_trainer.worker.folding import Folder, StepTail


def step(number: int, *, rank: int = 0, seconds: float = 0.5, **values: float) -> Step:
    return Step(
        at=100.0 + number,
        generation=3,
        rank=rank,
        world_size=2,
        step=number,
        epoch=0.5,
        total_steps=10,
        samples=64,
        tokens=640,
        values=values,
        seconds={"step": seconds, "data": seconds / 5} if seconds else {},
    )


def test_throughput_is_the_jobs() -> None:
    """Samples and tokens a second are the global batch over the mean step time."""
    folder = Folder(worker=1)
    folder.add([step(1, seconds=0.25), step(2, seconds=0.75)])
    window = folder.fold()
    assert window is not None
    assert (window.samples_per_s, window.tokens_per_s) == (128.0, 1280.0)
    assert (window.worker, window.rank, window.step, window.steps) == (1, 0, 2, 2)


def test_phases_spread_over_ranks() -> None:
    """Each phase tells its fastest, middle and slowest rank."""
    folder = Folder(worker=0)
    for rank, seconds in ((2, 0.1), (3, 0.2), (4, 0.6)):
        folder.add([step(1, rank=rank, seconds=seconds)])
    window = folder.fold()
    assert window is not None
    assert window.rank == 2
    assert window.phases["step"] == {"min": 0.1, "median": 0.2, "max": 0.6}


def test_newest_value_of_each_name_counts() -> None:
    """A value reported with any step of the window is in it; a later one replaces it."""
    folder = Folder(worker=0)
    folder.add([step(1, loss=2.0, accuracy=0.5), step(2, loss=1.0)])
    window = folder.fold()
    assert window is not None
    assert window.values == {"loss": 1.0, "accuracy": 0.5}


def test_values_after_the_last_step() -> None:
    """A record without seconds adds values and counts as no step."""
    folder = Folder(worker=0)
    folder.add([step(2), step(2, seconds=0.0, accuracy=0.9)])
    window = folder.fold()
    assert window is not None
    assert (window.steps, window.values, window.samples_per_s) == (1, {"accuracy": 0.9}, 128.0)


def test_nothing_folds_to_nothing() -> None:
    """Without steps there is no window."""
    assert Folder(worker=0).fold() is None


def test_half_a_record_is_read_later(tmp_path: Path) -> None:
    """A record that is being written is read when it is whole; one cut by a kill is left out."""
    path = tmp_path / "steps"
    tail = StepTail(path)
    assert not tail.opened
    line = encode_step(step(1))
    path.write_text(line[:20])
    assert tail.read() == []
    with path.open("a") as file:
        file.write(line[20:] + '{"at": 1' + "\n")
    assert [found.step for found in tail.read()] == [1]
    assert tail.read() == []


def test_read_records_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step file is emptied once it has been read and is large; nothing is read twice."""
    monkeypatch.setattr(folding, "TRUNCATE_AT_BYTES", 1000)
    path = tmp_path / "steps"
    tail, seen = StepTail(path), []
    with path.open("a", buffering=1) as file:
        for number in range(50):
            file.write(encode_step(step(number)))
            seen += tail.read()
    assert [found.step for found in seen] == [*range(50)]
    assert path.stat().st_size < 2000
