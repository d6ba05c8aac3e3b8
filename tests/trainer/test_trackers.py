"""What trackers are told, whose turn it is, and event files in a bucket."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from dtp_trainer import measures
from dtp_trainer.s3 import S3Storage
from dtp_trainer.storage import FileStorage
from dtp_trainer.trackers import tensorboard
from dtp_trainer.trackers.course import Back, Course
from dtp_trainer.trackers.tracker import About, Row
from dtp_trainer.trackers.turn import Standing, Superseded, Turn
from dtp_trainer.trackers.wandb import environment
from dtp_trainer.wire import Window

WEEK_S = 7 * 86_400


def window(at: float, step: int, generation: int = 1, **values: float) -> Window:
    found = {"loss": 1 / (step + 1), **values}
    return Window(at, generation, 0, 0, 1, step, 1, 0.0, None, found, None, None, {})


def test_the_examples_in_docstrings_hold() -> None:
    """What docstrings show is what happens."""
    for module in (measures, tensorboard):
        failed, tried = doctest.testmod(module)
        assert (failed, tried > 0) == (0, True)


def test_a_week_is_some_ten_thousand_rows_and_no_rare_value_is_lost() -> None:
    """Rows grow rarer with the age of the job; an accuracy of once an hour is always among them,
    at its own step."""
    course = Course()
    rows = []
    for second in range(0, WEEK_S, 5):
        rare = {"accuracy": float(second)} if second % 3600 == 0 else {}
        rows += list(course.window(window(second, second, **rare)))
    rows += [*course.flush()]
    found = [one for one in rows if isinstance(one, Row)]
    assert len(found) < 60_000
    steps = [one.step for one in found]
    assert steps == sorted(steps)
    rare_steps = [one.step for one in found if "accuracy" in one.values]
    assert rare_steps == [*range(0, WEEK_S, 3600)]


def test_a_new_generation_goes_back_to_where_it_begins() -> None:
    """The first window after a restart says which steps are trained again."""
    course = Course()
    rows = [*course.window(window(1.0, 10)), *course.window(window(2.0, 20))]
    again = [*course.window(window(3.0, 13, generation=2))]
    assert [one.step for one in rows if isinstance(one, Row)] == [10, 20]
    assert [one.step for one in again if isinstance(one, Back)] == [12]


def test_the_newest_takes_the_turn_and_waits_for_the_one_before(tmp_path: Path) -> None:
    """A newer process gets the turn with what the older one left; the older one is told, and
    nobody writes before it has closed its files."""
    storage = FileStorage(tmp_path)
    old = Turn(storage, (1, 1, 0))
    assert old.take() == Standing()
    old.keep(Standing(7, 1.0))
    told: list[Standing] = []
    taking = threading.Thread(target=lambda: told.append(Turn(storage, (1, 2, 0)).take()))
    taking.start()
    assert _superseded(old)
    assert not told
    old.leave(Standing(9, 1.0))
    taking.join(20)
    assert told == [Standing(9, 1.0)]
    with pytest.raises(Superseded):
        Turn(storage, (1, 1, 1)).take()


def _superseded(turn: Turn) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            turn.keep(Standing(8, 1.0))
        except Superseded:
            return True
    return False


def test_a_holder_that_is_gone_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """One that was killed never says that it left."""
    storage = FileStorage(tmp_path)
    Turn(storage, (1, 1, 0)).take()
    assert Turn(storage, (2, 1, 0), wait_s=0.3).take() == Standing()


def test_event_files_in_a_bucket(s3: S3Storage, tmp_path: Path) -> None:
    """What cannot be appended to is written as a whole, and TensorBoard reads it."""
    pytest.importorskip("tensorboard")
    about = About("j", "job", 1, 1, 0, 0, s3.uri, str(tmp_path), {}, {"lr": 1}, {})
    said: list[str] = []
    board = tensorboard.TensorBoard(about, said.append)
    for step in range(1, 50):
        board.log(Row(float(step), step, {"loss": 1 / step, "spike": float("nan")}))
    board.go_back(40)
    board.log(Row(60.0, 41, {"loss": 5.0}))
    board.close(None)
    (entry,) = s3.list("tensorboard/job/")
    (tmp_path / Path(entry.key).name).write_bytes(s3.read(entry.key))
    loss = _curves(tmp_path).Scalars("loss")
    assert [point.step for point in loss] == [*range(1, 42)]
    assert loss[-1].value == 5.0
    assert said == [f"TensorBoard: tensorboard --logdir {s3.uri.rstrip('/')}/tensorboard"]


def _curves(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder))
        found.Reload()
    return found


UNREACHABLE = """
import sys
from dtp_trainer.trackers.tracker import About, Row
from dtp_trainer.trackers.turn import Standing
from dtp_trainer.trackers.wandb import WeightsAndBiases
storage, scratch = sys.argv[1:]
about = About("j", "job", 1, 1, 0, 0, storage, scratch, {"wandb": {}}, {}, {})
tracker = WeightsAndBiases(about, print, Standing())
tracker.log(Row(1.0, 1, {"loss": 1.0}))
tracker.close(None)
"""


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_means_offline(tmp_path: Path) -> None:
    """With a key but no network the run is written here, and one line says so and why."""
    pytest.importorskip("wandb")
    env = {
        **os.environ,
        **environment(tmp_path / "scratch"),
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "2",
    }
    storage = (tmp_path / "job").as_uri()
    told = subprocess.run(
        [sys.executable, "-P", "-c", UNREACHABLE, storage, str(tmp_path / "scratch")],
        env=env,
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = told.stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("W&B: offline (its server cannot be used: ")
    assert [*(tmp_path / "job" / "wandb").glob("offline-run-*-j/run-j.wandb")]
