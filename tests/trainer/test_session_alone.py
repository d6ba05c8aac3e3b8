"""Promises of a session in one process that dtp did not start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtp_trainer import wire
from dtp_trainer.session import Session

DATA = torch.arange(20.0).unsqueeze(1)


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "steps.jsonl"
    monkeypatch.setenv(wire.Env.STEPS_FILE, str(path))
    return path


def session() -> Session:
    model = torch.nn.Linear(1, 1)
    return Session(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def records(path: Path) -> list[wire.Step]:
    return [step for step in map(wire.parse_step, path.read_text().splitlines()) if step]


def test_every_nth_step_the_last_one_and_ends_of_epochs_are_told(steps: Path) -> None:
    """In the body of the loop, of the step that is being taken."""
    nth, ends = [], []
    with session() as running:
        for _ in running.batches(DATA, global_batch=5, epochs=2):
            nth += [running.global_step + 1] if running.every(3) else []
            ends += [running.global_step + 1] if running.at_epoch_end else []
            running.step()
    assert nth == [3, 6, 8]
    assert ends == [4, 8]


def test_the_shorter_of_epochs_and_steps_ends_it(steps: Path) -> None:
    """Whole epochs, a number of steps, or both."""
    for limits, count in (({"epochs": 2}, 8), ({"steps": 6}, 6), ({"epochs": 1, "steps": 6}, 4)):
        with session() as running:
            assert sum(1 for _ in taken(running, **limits)) == count


def taken(
    running: Session, *, epochs: int | None = None, steps: int | None = None, seed: int = 0
) -> list[torch.Tensor]:
    seen = []
    for batch in running.batches(DATA, global_batch=5, epochs=epochs, steps=steps, seed=seed):
        seen.append(batch)
        running.step()
    return seen


def test_another_seed_is_another_order(steps: Path) -> None:
    """And the same seed the same one."""
    orders = []
    for seed in (0, 0, 1):
        with session() as running:
            orders.append(torch.stack(taken(running, epochs=1, seed=seed)).flatten().tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == DATA.flatten().tolist()


def test_an_evaluation_has_its_own_time(steps: Path) -> None:
    """Its values come with the step in whose body it was made, its time under its own name."""
    with session() as running:
        for _ in running.batches(DATA, global_batch=5, steps=2):
            if running.every(2):
                with running.evaluating():
                    running.log(accuracy=0.5)
            running.step(loss=1.0)
    first, second = records(steps)
    assert dict(first.values) == {"loss": 1.0}
    assert dict(second.values) == {"accuracy": 0.5, "loss": 1.0}
    assert "evaluate" in second.seconds
    assert "evaluate" not in first.seconds


def test_a_forgotten_step_is_said(steps: Path) -> None:
    """A position that does not move would train on the same data after a pause."""
    running = session()
    batches = running.batches(DATA, global_batch=5, epochs=1)
    next(batches)
    with pytest.raises(RuntimeError, match="once for each batch"):
        next(batches)
    running.finish()


def test_batches_are_asked_for_once(steps: Path) -> None:
    """A second call, for a second epoch say, is refused with the right way to do it."""
    with session() as running:
        next(running.batches(DATA, global_batch=5, epochs=1))
        with pytest.raises(RuntimeError, match="it goes through all epochs"):
            next(running.batches(DATA, global_batch=5, epochs=1))
        running.step()


def test_without_an_end_there_are_no_batches(steps: Path) -> None:
    """Neither epochs nor steps: the error says what is needed."""
    with session() as running, pytest.raises(ValueError, match="needs epochs, or steps"):
        next(running.batches(DATA, global_batch=5))


def test_a_batch_larger_than_the_data_ends_the_script_in_one_line(steps: Path) -> None:
    """The message says what would fit."""
    with session() as running, pytest.raises(SystemExit, match=r"^dtp: .*at most the dataset"):
        next(running.batches(DATA, global_batch=50, epochs=1))


def test_an_error_in_the_loop_passes_through(steps: Path) -> None:
    """It is the script's own; what was reported before it is kept."""

    def loop() -> None:
        with session() as running:
            for _ in running.batches(DATA, global_batch=5, epochs=1):
                running.step(loss=1.0)
                raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        loop()
    assert [record.step for record in records(steps)] == [1]


def test_finishing_twice_is_finishing_once(steps: Path) -> None:
    """By name and by the end of the block."""
    with session() as running:
        taken(running, epochs=1)
        running.log(final=1.0)
        running.finish()
    assert [dict(record.values) for record in records(steps)][-2:] == [{}, {"final": 1.0}]


def test_every_public_name_of_a_session_is_documented() -> None:
    """`docs/session.md` mentions each of them."""
    text = (Path(__file__).parents[2] / "docs" / "session.md").read_text()
    names = {name for name in vars(Session) if not name.startswith("_")}
    assert names >= {"batches", "step", "finish"}
    assert not [name for name in names if f"session.{name}" not in text]
