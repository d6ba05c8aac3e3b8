"""Promises of the built-in tasks: real data, pinned; and what they learn from it."""

from __future__ import annotations

import gzip
import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dtp_trainer import train, wire
from dtp_trainer.checkpoints.heads import raise_generation
from dtp_trainer.storage import FileStorage
from dtp_trainer.tasks import corpora, idx
from dtp_trainer.tasks.cnn import cnn
from dtp_trainer.tasks.evaluation import Patience
from dtp_trainer.tasks.gpt import Gpt, Size
from dtp_trainer.tasks.language import Language, Windows
from dtp_trainer.tasks.resnet import ResNet
from dtp_trainer.tasks.schedules import Schedule, factor
from dtp_trainer.tasks.vision import Vision

CONTEXT = Size().context


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
    pixels, labels = task.train.__getitems__(range(1440))
    assert (pixels.shape, labels.shape) == ((1440, 1, 8, 8), (1440,))
    assert 0 <= float(pixels.min()) < float(pixels.max()) == 1


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
    windows = Windows(torch.arange(4 * CONTEXT + 3, dtype=torch.int32).to(torch.uint8), CONTEXT)
    assert len(windows) == 4
    first, second = windows.__getitems__([0, 1])
    assert first[-1] == second[0]
    assert first.shape == (CONTEXT + 1,)


def test_the_language_model_sees_nothing_ahead() -> None:
    """Changing a byte changes no prediction before it."""
    torch.manual_seed(0)
    model = Gpt(Size()).eval()
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
        (["vision", "--schedule", "cosinus"], "invalid choice: 'cosinus'"),
        (["language", "--heads", "3"], "--width 128 cannot be dealt to --heads 3"),
        (["vision", "--data", "mnist"], "data: {mnist: /path}"),
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


@pytest.mark.parametrize(
    "args",
    [
        ["vision"],
        ["vision", "--model", "resnet", "--schedule", "linear"],
        ["language", "--layers", "1", "--width", "32", "--heads", "2", "--context", "16"],
    ],
)
def test_a_task_runs_alone_and_reports(args: list[str], steps: Path) -> None:
    """Under plain Python a few steps are taken, and loss, rate and a test are reported."""
    train.main([*args, "--steps", "3"])
    assert {"loss", "lr", "test_loss"} <= set(last_values(steps))
    assert len(steps.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "chosen",
    [
        {"precision": "bf16", "accumulate": 2, "clip_grad_norm": 1.0, "non_finite": "skip"},
        {"activation_checkpointing": True, "channels_last": True, "precision": "fp16"},
    ],
)
def test_every_option_goes_with_the_tasks(
    chosen: dict[str, object], steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a job file's `training:` hands them over."""
    monkeypatch.setenv(wire.Env.OPTIONS, json.dumps(chosen))
    train.main(["vision", "--model", "resnet", "--steps", "3"])
    chosen.pop("channels_last", None)
    monkeypatch.setenv(wire.Env.OPTIONS, json.dumps(chosen))
    train.main(["language", "--steps", "2", "--context", "16"])
    assert len(steps.read_text().splitlines()) == 5


@pytest.mark.parametrize("network", [cnn(8), ResNet()])
def test_networks_take_images_of_any_number(network: torch.nn.Module) -> None:
    """Of none too: a rank's last share of a test may be empty."""
    for count in (3, 0):
        assert network.eval()(torch.zeros(count, 1, 8, 8)).shape == (count, 10)


def test_the_language_model_has_the_size_that_was_asked_for() -> None:
    """Layers, width, heads and context; the defaults are those of the docs."""
    assert sum(p.numel() for p in Gpt(Size()).parameters()) == pytest.approx(0.86e6, rel=0.02)
    model = Gpt(Size(layers=2, width=32, heads=2, context=16))
    assert len(model.blocks) == 2
    assert model(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, 256)
    assert Language(Size(context=16)).tokens_per_sample == 16


def test_a_tasks_operations_are_known() -> None:
    """Of a sample, forward and backward: 6 a weight and byte, and what attention adds."""
    size = Size(layers=1, width=32, heads=2, context=16)
    weights = 32 * (3 * 32 + 32 + 2 * 4 * 32) + 32 * 256
    attention = 12 * 32 * 16
    assert Language(size).flops == pytest.approx(16 * (6 * weights + attention), rel=0.02)
    assert Vision().flops == pytest.approx(25e6, rel=0.02)


def test_a_schedule_rises_and_then_falls_as_its_name_says() -> None:
    """The factor of the highest rate, at the beginning, at the top, in the middle and at the
    end."""
    at = {
        name: [round(factor(name, warmup=10, total=110)(s), 3) for s in (0, 10, 60, 110)]
        for name in Schedule
    }
    assert at == {
        Schedule.COSINE: [0.1, 1, 0.55, 0.1],
        Schedule.LINEAR: [0.1, 1, 0.55, 0.1],
        Schedule.CONSTANT: [0.1, 1, 1, 1],
        Schedule.STEP: [0.1, 1, 0.1, 0.01],
    }


def test_patience_ends_after_evaluations_without_gain() -> None:
    """In a row; equal is no gain, NaN neither; its state is what it has seen."""
    patience = Patience(2)
    for measure, lost in ((3, False), (3, False), (2, False), (float("nan"), False), (2.5, True)):
        assert not patience.lost
        patience.saw(measure)
        assert patience.lost is lost
    other = Patience(3)
    other.load_state_dict(patience.state_dict())
    assert not other.lost
    other.saw(2.0)
    assert other.lost


def test_a_task_out_of_patience_ends_well(steps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says so, and takes no step more."""
    frozen = ["--lr", "0", "--weight-decay", "0", "--eval-every", "2"]
    train.main(["vision", "--steps", "100", "--patience", "2", *frozen])
    assert len(steps.read_text().splitlines()) == 6
    assert capsys.readouterr().err == "dtp: no gain in 2 evaluations: ended after 6 steps\n"


def test_patience_is_part_of_the_checkpoint(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in vain before a job was paused counts after it; a job that ran out of patience
    stays ended."""
    monkeypatch.setenv(wire.Env.STORAGE, (tmp_path / "storage").as_uri())
    frozen = ["vision", "--lr", "0", "--weight-decay", "0", "--eval-every", "2"]
    before = signal.getsignal(signal.SIGTERM)
    for arguments, last in (("--steps 3", 3), ("--steps 9 --patience 2", 4), ("--patience 2", 4)):
        monkeypatch.setenv(
            wire.Env.GENERATION, str(raise_generation(FileStorage(tmp_path / "storage")).generation)
        )
        train.main([*frozen, *arguments.split()])
        signal.signal(signal.SIGTERM, before)
        assert len(steps.read_text().splitlines()) == last


def write_idx(path: Path, shape: tuple[int, ...], values: bytes) -> None:
    header = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
    path.write_bytes(header + values if path.suffix != ".gz" else gzip.compress(header + values))


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with MNIST's files, of 8 images to learn from and 4 to be tested on."""
    monkeypatch.setenv(wire.Env.DATA, json.dumps({"mnist": str(tmp_path)}))
    for part, count, end in (("train", 8, ""), ("t10k", 4, ".gz")):
        images, labels = bytes(range(256)) * (count * 784 // 256 + 1), bytes(range(count))
        write_idx(
            tmp_path / f"{part}-images-idx3-ubyte{end}", (count, 28, 28), images[: count * 784]
        )
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", (count,), labels)
    return tmp_path


def test_mnist_is_read_from_its_own_files(mnist: Path, steps: Path) -> None:
    """Plain or gzipped, from the folder that the job file names."""
    images, labels = idx.mnist("train")
    assert (images.shape, labels.tolist()) == ((8, 28, 28), list(range(8)))
    assert images[0, 0, :4].tolist() == [0, 1, 2, 3]
    train.main(["vision", "--data", "mnist", "--steps", "1", "--global-batch", "4"])
    assert "accuracy" in last_values(steps)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"PNG"), "is no IDX file of bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its header says"),
        (lambda path: write_idx(path, (7,), bytes(7)), "do not fit the labels"),
    ],
)
def test_a_damaged_idx_file_is_named(
    mnist: Path, damage: Callable[[Path], object], words: str
) -> None:
    """In one line."""
    damage(mnist / "train-labels-idx1-ubyte")
    with pytest.raises(SystemExit, match=rf"^dtp: .*{words}"):
        idx.mnist("train")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "epochs"), [("cnn", 10), ("resnet", 8)])
def test_the_digits_are_learnt(steps: Path, model: str, epochs: int) -> None:
    """97 % of the test images and more."""
    train.main(["vision", "--model", model, "--epochs", str(epochs)])
    assert last_values(steps)["accuracy"] >= 0.97


@pytest.mark.slow
def test_the_text_is_learnt(steps: Path) -> None:
    """Better than any model can be that guesses each byte without the ones before it: their
    entropy. After 150 steps by a fifth."""
    _, counts = np.unique(corpora.text(), return_counts=True)
    shares = counts / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    small = ["--layers", "2", "--context", "32", "--global-batch", "48"]
    train.main(["language", "--steps", "150", "--warmup", "20", "--lr", "1e-3", *small])
    assert last_values(steps)["test_loss"] < 0.8 * entropy
