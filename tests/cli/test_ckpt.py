"""Promises of `dtp ckpt`: what a checkpoint holds, whether it is whole, its weights in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dtp_trainer.checkpoints.checkpoint import Checkpointer, StateBundle
from dtp_trainer.checkpoints.heads import Retention
from dtp_trainer.storage import FileStorage

STEPS = (5, 10)


@pytest.fixture
def digits(cli: Any) -> Path:
    """The folder of the checkpoints of a job named ``digits``: steps 5 and 10, the second one of
    a generation that was the second."""
    job = cli.rows("run", cli.job_file("pass", name="digits"), "--detach")[0]["id"]
    cli("wait", "digits")
    storage = FileStorage(cli.home / "storage" / "jobs" / job)
    for generation, step in enumerate(STEPS, start=1):
        model = {"fc.weight": torch.full((4, 3), float(step)), "fc.bias": torch.zeros(4).bfloat16()}
        adam = {"state": {0: {"exp_avg": torch.ones(4, 3)}}, "param_groups": [{"lr": 0.1}]}
        Checkpointer(
            storage, generation=generation, attempt=1, rank=0, world_size=1, policy=Retention()
        ).save(
            StateBundle({"model": model, "optimizer": adam}),
            step=step,
            epoch=step / 4,
            values={"loss": 0.5},
            data_state={"epoch": 1, "step": 2},
            blocking=True,
        )
    return storage.root / "checkpoints"


def flip(folder: Path, name: str) -> None:
    [path] = (folder / name).glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_show_tells_what_a_checkpoint_holds(cli: Any, digits: Path) -> None:
    """Where it stands, who made it, files with hashes, tensors by part; in 80 columns, and as one
    record with all of them."""
    shown = cli("ckpt", "show", "digits").stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    for words in (
        "step-000010.g0002  ",
        "step     10, epoch 2.5",
        "by 1 rank of attempt 1, generation 2, in ",
        f"torch    {torch.__version__}",
        "values   loss 0.5",
        "data     epoch 1  step 2",
        "checked  not yet",
        "rank-00000-of-00001.safetensors",
        "model      BF16         1        4   8 B",
    ):
        assert words in shown
    assert "model.fc.weight" in cli("ckpt", "show", "digits", "5", "--tensors").stdout
    [row] = cli.rows("ckpt", "show", "digits", "step-000005.g0001")
    assert row["step"] == 5
    assert row["data"] == {"epoch": 1, "step": 2}
    assert row["seconds"] > 0
    [file] = row["files"]
    assert len(file["sha256"]) == 64
    assert {"name": "model.fc.weight", "dtype": "F32", "shape": [4, 3], "bytes": 48} in row[
        "tensors"
    ]


def test_verify_marks_and_names_the_bad_one(cli: Any, digits: Path) -> None:
    """A flipped bit: exit code 1, the file is named, and the list says which is good."""
    flip(digits, "step-000005.g0001")
    assert cli("ckpt", "verify", "digits").stdout == "step-000010.g0002: good\n"
    said = cli("ckpt", "verify", "digits", "all", code=1).stdout.splitlines()
    assert said[0].startswith(
        "step-000005.g0001: bad: step-000005.g0001/rank-00000-of-00001.safetensors has sha256"
    )
    assert said[1:] == ["step-000010.g0002: good"]
    assert [row["verified"] for row in cli.rows("ckpt", "ls", "digits")] == [False, True]
    rows = cli.rows("ckpt", "verify", "digits", "all", code=1)
    assert [row["problem"] is None for row in rows] == [False, True]
    (digits / "step-000010.g0002" / "manifest.json").unlink()
    assert "manifest.json cannot be read" in cli("ckpt", "verify", "digits", code=1).stdout
    assert "manifest.json cannot be read" in cli.error("ckpt", "show", "digits", "10", code=7)


def test_export_writes_the_weights(cli: Any, digits: Path) -> None:
    """Names of the state_dict, origin in the metadata; with the optimizer only when asked; never
    over a file unless forced, never of a damaged checkpoint."""
    target = cli.folder / "w.safetensors"
    said = cli("ckpt", "export", "digits", target).stdout
    assert said.startswith(f"{target}: 2 tensors, ")
    assert said.endswith(" B from step-000010.g0002\n")
    weights = load_file(target)
    assert weights["fc.weight"].unique().tolist() == [10.0]
    assert weights["fc.bias"].dtype is torch.bfloat16
    assert "exists; choose another name, or add --force" in cli.error(
        "ckpt", "export", "digits", "5", target
    )
    [row] = cli.rows("ckpt", "export", "digits", "5", target, "--force", "--with-optimizer")
    assert (row["step"], row["tensors"], row["bytes"]) == (5, 3, target.stat().st_size)
    raw = target.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    about = header.pop("__metadata__")
    assert set(header) == {"fc.weight", "fc.bias", "optimizer.state.0.exp_avg"}
    assert (about["job"], about["step"]) == ("digits", "5")
    assert json.loads(about["optimizer"]) == {"param_groups": [{"lr": 0.1}]}
    flip(digits, "step-000005.g0001")
    other = cli.folder / "v.safetensors"
    assert "has sha256" in cli.error("ckpt", "export", "digits", "5", other, code=7)
    assert not other.exists()


def test_mistakes_are_one_line(cli: Any, digits: Path) -> None:
    """A checkpoint that is not there, a file of another kind, a job without one."""
    assert "there are steps 5, 10" in cli.error("ckpt", "show", "digits", "7")
    assert "ends in .safetensors" in cli.error("ckpt", "export", "digits", "w.pt")
    cli("run", cli.job_file("pass", name="fresh"), "--detach")
    cli("wait", "fresh")
    for words in (("show", "fresh"), ("verify", "fresh"), ("export", "fresh", "w.safetensors")):
        assert cli.error("ckpt", *words) == "the job has no checkpoint yet"
    assert cli("ckpt", "verify", "fresh", "all").stdout == ""


def test_a_damaged_list_hides_no_job(cli: Any, digits: Path) -> None:
    """`ps` and `show` tell all else about the job, and where its checkpoints stand what to do; the
    commands about checkpoints fail with that line."""
    (digits / "head.json").write_text("{")
    line = (
        f"checkpoints/head.json in {digits.parent.as_uri()} is damaged: restore it from a copy, "
        "or remove it to begin at step 0"
    )
    shown = cli("show", "digits").stdout
    assert f"\nCheckpoints\n  {line}\n" in shown
    assert {"Attempts", "Last events"} <= set(shown.splitlines())
    for [row] in (cli.rows("ps"), cli.rows("show", "digits")):
        assert (row["checkpoint"], row["checkpoint_problem"]) == (None, line)
    assert "damaged" in cli("ps", COLUMNS="160").stdout
    for words in (("ls",), ("show",), ("verify",), ("pin", "5")):
        assert cli.error("ckpt", words[0], "digits", *words[1:], code=7) == line


def test_a_grace_too_short_is_said_where_it_matters(cli: Any, digits: Path) -> None:
    """`show` of the job, and the plan of the next one of its name, say what to raise."""
    head = json.loads((digits / "head.json").read_text())
    for each in head["entries"]:
        each |= {"seconds": 41.0, "bytes": 5 << 30}
    (digits / "head.json").write_text(json.dumps(head))
    words = "a checkpoint of 5.0 GiB takes about 41 s here, stop_grace is 30s: raise stop_grace to"
    assert words in cli("show", "digits").stdout
    again = cli.job_file("pass", name="digits")
    assert f"the last job of this name: {words} 60s" in cli("run", again, "--dry-run").stdout
    enough = cli.job_file("pass", name="digits", stop_grace="1m")
    assert "stop_grace is" not in cli("run", enough, "--dry-run").stdout
