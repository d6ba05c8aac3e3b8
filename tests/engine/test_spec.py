"""A job file is parsed once, and every mistake in it is one line with its place."""

from __future__ import annotations

import dataclasses
import doctest
import re
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtp_engine import quantities
from dtp_engine.errors import SpecError, UsageError
from dtp_engine.jobs import Artifacts, JobSpec, Launcher, NodeRange, Wandb
from dtp_engine.spec import as_fields, json_schema, parse_spec, read_spec, walk
from dtp_trainer.options import CommHook, Compile, Options, Precision

FULL = """\
name: digits
nodes: 1..4
nproc_per_node: 2
resources: {gpus: 1, cpus: 1.5, memory: 16GB}
workdir: .
setup: pip list
run: python train.py --epochs 3
args:
  lr: 0.10
  amp: true
env:
  HF_TOKEN:
  EMPTY: ""
  FLAG: on
secrets: [WANDB_API_KEY]
data: {train: ./shards}
launcher: torchrun
training: {precision: bf16, compile: true, accumulate: 2, clip_grad_norm: 1e0, comm_hook: fp16}
checkpoint: {every: 500 steps, keep: 5, keep_best: val_loss}
retry: {on_errors: 1, on_preemption: unlimited, on_hang: 0}
watchdog: {start_within: 5m, no_step_for: 90s}
max_duration: 1h30m
stop_grace: 10s
priority: 70
tags: {team: vision}
wandb: {project: digits, tags: [a, b], artifacts: best}
tensorboard: on
"""
SHELL = {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "secret"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text("print('hello')\n")
    return tmp_path


def parse(folder: Path, text: str, *overrides: str) -> JobSpec:
    path = folder / "job.yaml"
    path.write_text(text)
    return read_spec(path, overrides=overrides, environ=SHELL)


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The message, without the folder in front of the file's name."""
    path = folder / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        read_spec(path, overrides=overrides, environ=SHELL)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/job.yaml", "job.yaml")


def test_every_field(folder: Path) -> None:
    """A file that uses every field arrives in the spec complete, with values as they were typed."""
    spec = parse(folder, FULL)
    assert spec.name == "digits"
    assert spec.nodes == NodeRange(1, 4)
    assert spec.nproc_per_node == 2
    assert spec.resources.memory_bytes == 16 * 10**9
    assert spec.workdir == str(folder)
    assert spec.args == {"lr": "0.10", "amp": "true"}
    assert spec.env == {"HF_TOKEN": "hf_1", "EMPTY": "", "FLAG": "on"}
    assert spec.secrets == ("WANDB_API_KEY",)
    assert (spec.checkpoint.every, spec.checkpoint.every_steps) == (None, 500)
    assert spec.retry.on_preemption is None
    assert spec.watchdog.no_step_for == timedelta(seconds=90)
    assert spec.max_duration == timedelta(minutes=90)
    assert spec.stop_grace == timedelta(seconds=10)
    assert spec.launcher is Launcher.TORCHRUN
    assert spec.training == Options(
        precision=Precision.BF16,
        compile=Compile.DEFAULT,
        accumulate=2,
        clip_grad_norm=1.0,
        comm_hook=CommHook.FP16,
    )
    assert spec.wandb == Wandb(project="digits", tags=("a", "b"), artifacts=Artifacts.BEST)
    assert spec.tensorboard


def test_every_training_option_is_a_field(folder: Path) -> None:
    """What `Session` can be given in a script, a job file can say; nothing else."""
    fields = {r.path.removeprefix("training.") for r in walk() if r.path.startswith("training.")}
    assert fields == {field.name for field in dataclasses.fields(Options)}


def test_a_default_that_is_written_is_given(folder: Path) -> None:
    """`compile: false` turns off what a script turned on; what is not written leaves it alone."""
    spec = parse(folder, "task: vision\ntraining: {compile: false, accumulate: 2}\n")
    assert spec.options == {"compile": "off", "accumulate": 2}
    assert parse(folder, yaml.safe_dump(as_fields(spec))) == spec


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("true", Wandb()), ("{}", Wandb()), ("false", None), ("{project: x}", Wandb(project="x"))],
)
def test_wandb_is_a_switch_or_a_section(folder: Path, text: str, wanted: Wandb | None) -> None:
    """`wandb: true` is all that is needed; fields say more; absent and false are off."""
    spec = parse(folder, f"task: vision\nwandb: {text}\n")
    assert spec.wandb == wanted
    assert parse(folder, yaml.safe_dump(as_fields(spec))) == spec
    assert parse(folder, "task: vision\n").wandb is None


def test_defaults(folder: Path) -> None:
    """A file with one line is a job; its name is the file's."""
    spec = parse(folder, "run: python train.py\n")
    assert spec == JobSpec(name="job", run="python train.py", workdir=str(folder))


def test_ranks_default_to_gpus(folder: Path) -> None:
    """A worker has one rank for each of its GPUs unless told otherwise."""
    assert parse(folder, "run: python train.py\nresources: {gpus: 4}\n").nproc_per_node == 4


def test_anchors_and_merges(folder: Path) -> None:
    """Anchors, aliases and merges work; what is written beats what is merged."""
    text = "tags: &t {a: x, b: y}\nrun: python train.py\nargs:\n  <<: *t\n  b: z\n"
    assert parse(folder, text).args == {"b": "z", "a": "x"}


def test_as_fields_reads_back(folder: Path) -> None:
    """A spec written out in full and read again is the same spec."""
    spec = parse(folder, FULL)
    assert parse(folder, yaml.safe_dump(as_fields(spec))) == spec
    small = parse(folder, "task: vision\n")
    assert parse(folder, yaml.safe_dump(as_fields(small))) == small


def _mistakes() -> list[tuple[str, str]]:
    """(text, message) of each block of the list beside this file."""
    _, *blocks = Path(__file__).with_name("spec_mistakes.txt").read_text().split("\n\n")
    parts = [block.strip("\n").partition("=> ") for block in blocks]
    return [(text, message) for text, _, message in parts]


@pytest.mark.parametrize(("text", "message"), _mistakes())
def test_mistakes(folder: Path, text: str, message: str) -> None:
    """Each mistake is told in one line with file, line, field and what to write instead."""
    assert refusal(folder, text) == message.replace("FOLDER", str(folder))


@pytest.mark.parametrize("text", ["", "\n\n", "# later\n", "---\n"])
def test_empty_file(folder: Path, text: str) -> None:
    """A file without a field is called empty."""
    assert refusal(folder, text) == "job.yaml:1: the file is empty"


def test_other_encoding(folder: Path) -> None:
    """A file that is not UTF-8 is refused at the line of the first wrong byte."""
    message = refusal(folder, b"run: python train.py\nname: caf\xe9\n")
    assert message == "job.yaml:2: not UTF-8 (byte 0xe9); save the file as UTF-8"


def test_missing_file(folder: Path) -> None:
    """A file that is not there is named, with the nearest one that is."""
    (folder / "digits.yaml").write_text("task: vision\n")
    with pytest.raises(SpecError, match=r"digit\.yaml: no such file; did you mean .*digits\.yaml"):
        read_spec(folder / "digit.yaml")


def test_script_instead_of_job_file(folder: Path) -> None:
    """A script given as job file is explained."""
    with pytest.raises(SpecError, match="this is a script"):
        read_spec(folder / "train.py")


def test_folder_instead_of_file(folder: Path) -> None:
    """A folder is no job file."""
    with pytest.raises(SpecError, match="this is a folder"):
        read_spec(folder)


def test_alias_bomb(folder: Path) -> None:
    """A file that grows beyond reason through aliases is refused at once."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    assert "more than 10000 values" in refusal(folder, "\n".join(rows))


def test_setup_may_bring_the_script(folder: Path) -> None:
    """A job with a set-up line may name a script that is not there yet."""
    assert parse(folder, "setup: git clone x\nrun: python later.py\n").setup == "git clone x"


def test_overrides(folder: Path) -> None:
    """--set replaces and adds fields at any depth; the last one wins."""
    spec = parse(
        folder,
        FULL,
        "checkpoint.every=30s",
        "nodes=2",
        "env.HF_TOKEN=hf_2",
        "args.lr=0.5",
        "args.lr=0.7",
        "args.extra=a: b=c",
        "tags={x: y}",
        "training.precision=fp16",
        "wandb.project=p",
    )
    assert spec.training.precision is Precision.FP16
    assert spec.wandb is not None
    assert (spec.wandb.project, spec.wandb.tags) == ("p", ("a", "b"))
    assert spec.checkpoint.every == timedelta(seconds=30)
    assert spec.checkpoint.every_steps is None
    assert spec.nodes == NodeRange(2, 2)
    assert spec.env["HF_TOKEN"] == "hf_2"
    assert spec.args == {"amp": "true", "lr": "0.7", "extra": "a: b=c"}
    assert spec.tags == {"x": "y"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nodes=0", "--set nodes=0: nodes: must be at least 1, found 0"),
        ("gpus=1", '--set gpus=1: gpus: unknown field; did you mean "resources.gpus"?'),
        ("nodes", "--set nodes: write it as field=value, such as checkpoint.every=30s"),
        ("=1", "--set =1: write it as field=value, such as checkpoint.every=30s"),
        ("env.A.B=1", "--set env.A.B=1: env.A: expected one value, found a mapping"),
        ("tags=[1", "--set tags=[1: not YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_wrong_overrides(folder: Path, override: str, message: str) -> None:
    """A mistake in --set is told like one in the file, and named as --set."""
    assert refusal(folder, FULL, override) == message


def test_name_option(folder: Path) -> None:
    """--name wins over the file, and is checked as the file is."""
    (folder / "job.yaml").write_text("task: vision\nname: a\n")
    assert read_spec(folder / "job.yaml", name="b").name == "b"
    with pytest.raises(SpecError, match="--name: name: expected letters"):
        read_spec(folder / "job.yaml", name="b c")


def test_schema_accepts_what_the_parser_accepts() -> None:
    """The schema has every field of the reference, with a description."""
    schema = json_schema()
    for reference in walk():
        section, _, name = reference.path.rpartition(".")
        where = schema["properties"][section] if section else schema
        where = where.get("oneOf", [where])[0] if section else where
        assert where["properties"][name]["description"].startswith(reference.help[:20])
    duration = schema["properties"]["max_duration"]["pattern"]
    assert re.match(duration, "1h30m")
    assert not re.match(duration, "90")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=200))
def test_any_text_is_a_job_or_one_line(text: str) -> None:
    """No text makes the parser fail with anything but one line."""
    message = "a job"
    try:
        parse_spec(text.encode("utf-8", "replace").decode(), folder=Path("/"), environ={})
    except UsageError as error:
        message = str(error)
    assert message
    assert "\n" not in message


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**11), st.integers(1, 2**49))
def test_quantities_read_back(milliseconds: int, count: int) -> None:
    """Durations and sizes that dtp writes are read back exactly."""
    length = timedelta(milliseconds=milliseconds)
    assert abs(quantities.parse_duration(quantities.write_duration(length)) - length) < timedelta(
        milliseconds=1
    )
    assert quantities.parse_size(quantities.write_size(count)) == count


@pytest.mark.parametrize(
    "text", ["2GB", "16GB", "16GiB", "1500MB", "512MiB", "1TB", "1KiB", "7B", "1023B", "0B"]
)
def test_a_size_is_written_as_people_would(text: str) -> None:
    """The shortest exact way, decimal or binary, whichever it was."""
    assert quantities.write_size(quantities.parse_size(text)) == text


@pytest.mark.parametrize(
    "name",
    [
        "dtp_engine.engine",
        "dtp_engine.launches",
        "dtp_engine.quantities",
        "dtp_engine.series",
        "dtp_trainer.wire",
        "dtp_tui.cleaning",
        "dtp_tui.labels",
    ],
)
def test_examples_are_true(name: str) -> None:
    """What a docstring shows is what happens."""
    failed, tried = doctest.testmod(import_module(name))
    assert tried > 0
    assert failed == 0
