"""The reference pages say what the program does: nothing is missing, nothing is made up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dtp_engine.settings import SETTINGS
from dtp_engine.spec import parse_spec, walk
from dtp_tui.cli import COMMANDS, program
from dtp_tui.output import Exit

DOCS = Path(__file__).parents[2] / "docs"
CLI = (DOCS / "cli.md").read_text()
JOB_FILE = (DOCS / "job-file.md").read_text()


def leaves(command: Any, words: tuple[str, ...] = ("dtp",)) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with the words that call it."""
    inner = getattr(command, "commands", None)
    if not inner:
        yield " ".join(words), command
        return
    for name, each in inner.items():
        yield from leaves(each, (*words, name))


LEAVES = dict(leaves(typer.main.get_command(program())))


@pytest.mark.parametrize("words", LEAVES)
def test_every_command_is_documented(words: str) -> None:
    """Each command has a row in its table."""
    assert re.search(rf"^\| `{words}[ `]", CLI, re.MULTILINE)


@pytest.mark.parametrize("words", LEAVES)
def test_every_option_is_documented(words: str) -> None:
    """Each option is named on the page of commands."""
    for parameter in LEAVES[words].params:
        for option in parameter.opts:
            assert not option.startswith("--") or option in CLI, f"{words} {option}"


def test_no_command_is_made_up() -> None:
    """Every command that the page names exists."""
    named = set(re.findall(r"`dtp ([a-z]+)", CLI + JOB_FILE))
    assert named <= set(COMMANDS)


def test_every_exit_code_is_documented() -> None:
    """The table of exit codes is the one of the program."""
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", CLI, re.MULTILINE)}
    assert codes == {int(code) for code in Exit}


def test_every_field_is_documented() -> None:
    """The table of fields is the one that the parser reads."""
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.*) \| (.*) \| (.*) \|$", JOB_FILE, re.MULTILINE)
    assert rows == [(r.path, r.words, r.default or "—", r.help) for r in walk()]


def test_every_setting_is_documented() -> None:
    """The table of settings names each with its variable."""
    rows = re.findall(r"^\| `([a-z_]+)` \| `(DTP_[A-Z_]+)` \|", CLI, re.MULTILINE)
    assert rows == [(setting.name, setting.variable) for setting in SETTINGS]


def test_the_examples_are_job_files(tmp_path: Path) -> None:
    """Every job file on the page can be run."""
    (tmp_path / "train.py").write_text("")
    environ = {"HF_HOME": "/x", "WANDB_API_KEY": "x"}
    examples = re.findall(r"```yaml\n(.*?)```", JOB_FILE, re.DOTALL)
    specs = [parse_spec(text, folder=tmp_path, environ=environ) for text in examples]
    assert [spec.name for spec in specs] == ["job", "resnet"]
