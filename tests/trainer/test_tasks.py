"""Promises of the built-in tasks: real data, pinned; and what they learn from it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from dtp_trainer import train, wire
from dtp_trainer.tasks import corpora
from dtp_trainer.tasks.language import CONTEXT, Gpt, Windows
from dtp_trainer.tasks.vision import Vision


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a task that runs in this process reports."""
    path = tmp_path / "steps.jsonl"
    monkeypatch.setenv(wire.Env.STEPS_FILE, str(path))
    torch.set_num_threads(1)
    return path


def last_values(steps: Path) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in steps.read_text().splitlines():
        record = wire.parse_step(line)
        values |= record.values if record else {}
    return values


def test_the_digits_are_split_for_good() -> None:
    """1,440 images to learn from and 357 others to be tested on, all ten digits in both."""
    task = Vision()
    assert (len(task.train), len(task.test)) == (1440, 357)
    assert set(task.test.labels.tolist()) == set(task.train.labels.tolist()) == set(range(10))
    assert task.train.pixels.shape == (1440, 1, 8, 8)
    assert 0 <= float(task.train.pixels.min()) < float(task.train.pixels.max()) == 1


def test_the_king_james_text_is_whole_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built once, checked by its hash, rebuilt when the kept copy is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = corpora.text()
    assert bytes(text[:31]) == b"1:1 In the beginning God created"[:31]
    (kept,) = (tmp_path / "dtp").iterdir()
    assert (
        hashlib.sha256(kept.read_bytes()).hexdigest() == hashlib.sha256(text.tobytes()).hexdigest()
    )
    kept.write_bytes(b"damaged")
    assert len(corpora.text()) == len(text)
    assert kept.stat().st_size == len(text)


def test_a_cache_that_cannot_be_written_is_only_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is there all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(corpora.text()) == 4305143


def test_pythons_own_library_is_text_enough() -> None:
    """What stands in for the King James text is big enough, and the same each time."""
    source = corpora.python_source()
    assert len(source) == 4_000_000
    assert bytes(source) == bytes(corpora.python_source())


def test_windows_share_one_byte_with_the_next() -> None:
    """Every byte but the first is predicted exactly once."""
    windows = Windows(torch.arange(4 * CONTEXT + 3, dtype=torch.int32).to(torch.uint8))
    assert len(windows) == 4
    first, second = windows.__getitems__([0, 1])
    assert first[-1] == second[0]
    assert first.shape == (CONTEXT + 1,)


def test_the_language_model_sees_nothing_ahead() -> None:
    """Changing a byte changes no prediction before it."""
    torch.manual_seed(0)
    model = Gpt().eval()
    text = torch.randint(256, (1, CONTEXT))
    changed = text.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 256
    with torch.no_grad():
        before, after = model(text), model(changed)
    assert torch.equal(before[0, :40], after[0, :40])
    assert not torch.allclose(before[0, 40], after[0, 40])


def test_options_may_be_written_as_in_a_job_file() -> None:
    """``--global_batch`` is ``--global-batch``; values are left alone."""
    args = train.parse(["vision", "--global_batch", "24", "--lr=1e-3"])
    assert (args.global_batch, args.lr, args.epochs) == (24, 1e-3, 60)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "required: vision|language"),
        (["visoin"], "invalid choice: 'visoin'"),
        (["vision", "--epochs", "0"], "0 is not 1 or more"),
        (["vision", "--epochs", "many"], "many is not 1 or more"),
        (["vision", "--global-batch", "5000"], "does not fit a dataset of 1440"),
    ],
)
def test_wrong_options_are_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script ends; the last line says what is wrong."""
    with pytest.raises(SystemExit) as ended:
        train.main(args)
    said = f"{capsys.readouterr().err}{ended.value.code}".splitlines()
    assert words in " ".join(said[-2:])


def test_missing_data_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its package the vision task ends with one line."""
    monkeypatch.setattr(corpora, "_packaged", lambda *_: None)
    with pytest.raises(SystemExit, match=r"^dtp: .*: pip install scikit-learn$"):
        train.main(["vision"])


@pytest.mark.parametrize("task", ["vision", "language"])
def test_a_task_runs_alone_and_reports(task: str, steps: Path) -> None:
    """Under plain Python a few steps are taken, and loss, rate and a test are reported."""
    train.main([task, "--steps", "3"])
    assert {"loss", "lr", "test_loss"} <= set(last_values(steps))
    assert len(steps.read_text().splitlines()) == 3


@pytest.mark.slow
def test_the_digits_are_learnt(steps: Path) -> None:
    """97 % of the test images and more."""
    train.main(["vision", "--epochs", "15"])
    assert last_values(steps)["accuracy"] >= 0.97
