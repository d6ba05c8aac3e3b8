"""Scripts written for torchrun, under `dtp run` as they are; and the page that upgrades one."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
UPGRADE = ROOT / "examples" / "upgrade"

pytestmark = [pytest.mark.timeout(300)]


def said(dtp: Any, job: str) -> dict[str, list[str]]:
    """What each rank has printed."""
    lines: dict[str, list[str]] = {}
    for row in dtp.rows("logs", job):
        lines.setdefault(row["source"], []).append(row["text"])
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic", "snapshots", "accumulate"])
def test_a_script_in_the_style_of_the_tutorials_runs_unchanged(
    warm: Any, name: str, tmp_path: Path
) -> None:
    """Two ranks train, the exit code is 0, and the log knows who said what."""
    path = ROOT / "examples" / "torchrun" / f"{name}.yaml"
    args = ["--set", f"args.snapshot={tmp_path / 'it.pt'}"] if name == "snapshots" else []
    warm.run("run", "--headless", *args, path)
    lines = said(warm, f"torchrun-{name}")
    losses = [line for line in lines["rank0"] if "loss" in line]
    assert losses, lines
    assert not [line for line in lines.get("rank1", []) if "loss" in line]
    if name == "basic":
        assert lines["rank1"][0].startswith("rank 1 of 2 on ")


@pytest.mark.slow
def test_a_trainer_with_snapshots_goes_on_from_its_own(warm: Any, tmp_path: Path) -> None:
    """Started again, a script that keeps snapshots reads them as it would under torchrun."""
    path = ROOT / "examples" / "torchrun" / "snapshots.yaml"
    snapshot = f"args.snapshot={tmp_path / 'it.pt'}"
    for name, epochs in (("first", 2), ("second", 4)):
        args = ("--set", snapshot, "--set", f"args.epochs={epochs}", "--name", name)
        warm.run("run", "--headless", *args, path)
    lines = said(warm, "second")
    assert lines["rank1"] == ["rank 1 goes on after epoch 2"]
    assert [line.split(":")[0] for line in lines["rank0"][1:]] == ["epoch 3 of 4", "epoch 4 of 4"]


@pytest.mark.slow
def test_the_test_script_of_accelerate_passes(warm: Any, job_file: Callable[..., Path]) -> None:
    """What accelerate ships to check a launcher holds under `dtp run` with two ranks."""
    pytest.importorskip("accelerate", reason="accelerate is in the group `bench`")
    path = job_file(
        "",
        run="python -m accelerate.test_utils.scripts.test_script",
        nproc_per_node=2,
        env={"ACCELERATE_USE_CPU": "true"},
        retry={"on_errors": 0},
    )
    warm.run("run", "--headless", path, timeout=240)
    assert any("rank1" in source for source in said(warm, path.stem))


def test_a_script_that_needs_a_gpu_says_so_in_one_line(
    warm: Any, job_file: Callable[..., Path]
) -> None:
    """The error of a script that cannot run here reaches the user as one line."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    script = "import os, torch\ntorch.cuda.set_device(int(os.environ['LOCAL_RANK']))\n"
    path = job_file(script, nproc_per_node=2, retry={"on_errors": 0})
    rows = warm.rows("run", path, "--headless", code=1)
    detail = rows[-1]["detail"]
    assert re.search(r"rank [01] failed.*(CUDA|cuda)", detail), rows[-1]
    assert "\n" not in detail


@pytest.mark.slow
def test_the_upgrade_prints_the_same_losses(warm: Any) -> None:
    """Before and after the five lines, both ranks print the same losses, digit by digit."""
    found = []
    for name, job in (("before", "loop"), ("after", "upgraded-loop")):
        warm.run("run", "--headless", UPGRADE / f"{name}.yaml")
        lines = said(warm, job)
        found.append([lines[rank] for rank in ("rank0", "rank1")])
    assert found[0] == found[1]
    assert [line.split(":")[1] for line in found[0][0]][-1] == " step 300"


def test_the_page_shows_the_difference_of_the_files() -> None:
    """The diff in docs/upgrade.md is that of the two examples, and adds five lines of code."""
    before, after = [
        (UPGRADE / name).read_text().splitlines() for name in ("before.py", "after.py")
    ]
    diff = list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]
    page = (ROOT / "docs" / "upgrade.md").read_text()
    shown = page.split("```diff\n")[1].split("```")[0].splitlines()
    assert shown == ["@@" if line.startswith("@@") else line.rstrip() for line in diff]
    added = [line[1:] for line in diff if line.startswith("+") and line[1:].strip()]
    assert len([line for line in added if "import" not in line]) == 5
