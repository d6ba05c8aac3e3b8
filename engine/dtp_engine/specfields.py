"""The one table of a job file's fields: parser, JSON schema and reference are made from it.

A `Kind` says how one value is read and how an editor should check it; a `Field` gives it a name,
a default in words and a line of help; a `Section` is a group of fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dtp_engine import quantities
from dtp_engine.errors import SpecError
from dtp_engine.yamltree import Items, Scalar, Table, Tree, kind_of

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
TASKS = ("vision", "language")
OWN_VARIABLES = frozenset(
    (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_ERROR_FILE",
    )
)
"""Environment that every rank is given; a job file cannot set it."""

Read: TypeAlias = Callable[[str, Tree], Any]
"""(field as people name it, value) → what `JobSpec` holds; raises `SpecError`."""


@dataclass(frozen=True, slots=True)
class Kind:
    words: str
    """"a duration such as 10m"."""
    schema: Mapping[str, Any]
    read: Read


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    kind: Kind
    help: str
    default: str = ""
    """In words; empty when nothing happens without it."""


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    help: str
    fields: tuple[Field, ...]


def wrong(tree: Tree, name: str, problem: str) -> SpecError:
    """``where: field: problem``, the shape of every message about a field."""
    return SpecError(f"{tree.where}: {name}: {problem}")


# ------------------------------------------------------------------------------------------- kinds


def _scalar(words: str, parse: Callable[[str], Any]) -> Read:
    """Reads one value that is neither empty, a list nor a mapping."""

    def read(name: str, tree: Tree) -> Any:
        if not isinstance(tree, Scalar) or tree.empty or not tree.text.strip():
            raise wrong(tree, name, f"expected {words}, found {_what(tree)}")
        try:
            return parse(tree.text.strip())
        except ValueError as error:
            raise wrong(tree, name, str(error)) from None

    return read


def _what(tree: Tree) -> str:
    return "nothing" if isinstance(tree, Scalar) and not tree.text.strip() else kind_of(tree)


def kind(words: str, parse: Callable[[str], Any], **schema: Any) -> Kind:
    return Kind(words, schema, _scalar(words, parse))


def _whole(words: str, *, least: int, most: int) -> Kind:
    def parse(text: str) -> int:
        return quantities.parse_whole(text, least=least, most=most)

    return kind(words, parse, type="integer", minimum=least, maximum=most)


def _unlimited(words: str, *, most: int) -> Kind:
    def parse(text: str) -> int | None:
        return None if text == "unlimited" else quantities.parse_whole(text, least=0, most=most)

    choices = [{"type": "integer", "minimum": 0, "maximum": most}, {"const": "unlimited"}]
    return kind(words, parse, oneOf=choices)


def _matching(words: str, pattern: str) -> Kind:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f'expected {words}, found "{text}"')
        return text

    return kind(words, parse, type="string", pattern=pattern)


def _choice(words: str, options: tuple[str, ...]) -> Kind:
    def parse(text: str) -> str:
        if text not in options:
            raise ValueError(f'expected {" or ".join(options)}, found "{text}"')
        return text

    return kind(words, parse, enum=list(options))


def _steps_or_duration(text: str) -> Any:
    steps = re.fullmatch(r"(\S+)\s+steps?", text)
    if steps:
        return quantities.parse_whole(steps[1], least=1, most=10**9)
    if text in ("never", "off"):
        return None
    try:
        return quantities.parse_duration(text)
    except ValueError as error:
        unit = "needs a unit" in str(error)
        more = f', or "{text} steps"' if unit else ', or as "500 steps"'
        raise ValueError(f"{error}{more}") from None


def _positive(text: str) -> Any:
    found = quantities.parse_duration(text)
    if found.total_seconds() <= 0:
        raise ValueError("must be more than 0")
    return found


def _line(text: str) -> str:
    return text


def read_texts(name: str, tree: Tree) -> dict[str, Scalar]:
    """A mapping of names to single values, kept as they were typed."""
    if isinstance(tree, Scalar) and tree.empty:
        return {}
    if not isinstance(tree, Table):
        raise wrong(tree, name, f"expected `name: value` lines, found {kind_of(tree)}")
    found: dict[str, Scalar] = {}
    for entry in tree.entries:
        if not isinstance(entry.value, Scalar):
            problem = f"expected one value, found {kind_of(entry.value)}"
            raise wrong(entry.value, f"{name}.{entry.key}", problem)
        found[entry.key] = entry.value
    return found


def _texts(name: str, tree: Tree) -> dict[str, str]:
    found = read_texts(name, tree)
    for key, value in found.items():
        if value.empty:
            raise wrong(value, f"{name}.{key}", 'a value is missing; write "" for an empty one')
    return {key: value.text for key, value in found.items()}


def _names(name: str, tree: Tree) -> tuple[str, ...]:
    if isinstance(tree, Scalar) and tree.empty:
        return ()
    if not isinstance(tree, Items):
        raise wrong(tree, name, f"expected a list such as [WANDB_API_KEY], found {kind_of(tree)}")
    read = _matching("a variable's name", VARIABLE_PATTERN).read
    return tuple(read(name, item) for item in tree.items)


def _variables(name: str, tree: Tree) -> dict[str, Scalar]:
    found = read_texts(name, tree)
    for key, value in found.items():
        if not re.fullmatch(VARIABLE_PATTERN, key):
            raise wrong(value, f"{name}.{key}", "not a name that a shell could set")
        if key in OWN_VARIABLES:
            raise wrong(value, f"{name}.{key}", "every rank is given this by dtp; leave it out")
    return found


_PLAIN = {"type": ["string", "number", "boolean"]}
_DURATION = {"type": "string", "pattern": quantities.DURATION_PATTERN}

NAME = _matching("letters, digits, dots, dashes; at most 63", NAME_PATTERN)
TEXT = kind("text", _line, type="string", minLength=1)
COMMAND = kind("a command line", _line, type="string", minLength=1)
NODES = kind(
    "a number of workers such as 2, or a range such as 1..4",
    quantities.parse_nodes,
    oneOf=[
        {"type": "integer", "minimum": 1, "maximum": quantities.MOST_WORKERS},
        {"type": "string", "pattern": quantities.RANGE_PATTERN},
    ],
)
CPUS = kind(
    "a number of cores",
    lambda text: quantities.parse_number(text, above=0, most=4096),
    type="number",
    exclusiveMinimum=0,
    maximum=4096,
)
SIZE = kind(
    "a size such as 16GB or 512MiB",
    quantities.parse_size,
    type="string",
    pattern=quantities.SIZE_PATTERN,
)
DURATION = kind("a duration such as 10m or 1h30m", _positive, **_DURATION)
EVERY = kind(
    "a duration such as 10m, `500 steps`, or never",
    _steps_or_duration,
    oneOf=[_DURATION, {"type": "string", "pattern": r"^\d+\s+steps?$"}, {"const": "never"}],
)
TEXTS = Kind("names with values", {"type": "object", "additionalProperties": _PLAIN}, _texts)
VARIABLES = Kind(
    "environment variables",
    {"type": "object", "additionalProperties": {"type": [*_PLAIN["type"], "null"]}},
    _variables,
)
NAMES = Kind("a list of names", {"type": "array", "items": {"type": "string"}}, _names)

# ------------------------------------------------------------------------------------------ fields

FIELDS: tuple[Field | Section, ...] = (
    Field("name", NAME, "How commands call the job.", "the file's name"),
    Field(
        "nodes",
        NODES,
        "How many workers: `2` is exactly two; `1..4` is elastic, wishes four, starts with what "
        "fits, and may be scaled while it runs.",
        "1",
    ),
    Field(
        "nproc_per_node",
        _whole("a number of ranks", least=1, most=256),
        "Ranks (processes) of one worker.",
        "`resources.gpus`, at least 1",
    ),
    Section(
        "resources",
        "What one worker needs; a job waits in QUEUED until it fits.",
        (
            Field("gpus", _whole("a number of GPUs", least=0, most=64), "GPUs.", "0"),
            Field("cpus", CPUS, "CPU cores; a fraction is fine.", "1"),
            Field("memory", SIZE, "Memory, such as 16GB (10⁹) or 16GiB (2³⁰).", "not reserved"),
        ),
    ),
    Field(
        "workdir",
        TEXT,
        "Where the ranks run; a relative path begins at the job file.",
        "the file's folder",
    ),
    Field("setup", COMMAND, "A shell line that each worker runs once before its ranks start."),
    Field(
        "run",
        COMMAND,
        "What every rank runs, such as `python train.py --epochs 3`; dtp is the launcher, so no "
        "torchrun.",
    ),
    Field("task", _choice("a built-in task", TASKS), "A built-in trainer instead of `run`."),
    Field("args", TEXTS, "Options of the task, or appended to `run` as `--name value`."),
    Field(
        "env",
        VARIABLES,
        "Environment of the ranks; an empty value is taken from the shell that submits, and "
        "refused when it is not set there.",
    ),
    Field(
        "secrets",
        NAMES,
        "Variables taken from the shell that submits; their values are never shown.",
    ),
    Field("data", TEXTS, "Names and locations of data, handed to the ranks as `DTP_DATA`."),
    Section(
        "checkpoint",
        "For scripts that use `Session`, and for tasks.",
        (
            Field("every", EVERY, "A duration, `500 steps`, or `never`.", "10m"),
            Field("keep", _whole("a number", least=1, most=10_000), "How many are kept.", "3"),
            Field(
                "keep_best",
                TEXT,
                "A reported value; the checkpoint with the best one is kept too. Names that hold "
                "`loss` or `error` are better when smaller.",
            ),
        ),
    ),
    Section(
        "retry",
        "Separate budgets for what can go wrong.",
        (
            Field("on_errors", _whole("a number", least=0, most=1000), "The script failed.", "3"),
            Field(
                "on_preemption",
                _unlimited("a number, or unlimited", most=10_000),
                "The machine was taken away.",
                "unlimited",
            ),
            Field("on_hang", _whole("a number", least=0, most=1000), "No step for too long.", "2"),
        ),
    ),
    Section(
        "watchdog",
        "When a job counts as stuck.",
        (
            Field(
                "start_within",
                DURATION,
                "From launch to the first step; scripts without `Session` are not watched for it.",
                "15m",
            ),
            Field("no_step_for", DURATION, "Between two steps; then the hanging rank is named."),
        ),
    ),
    Field("max_duration", DURATION, "Time in RUNNING after which the job stops with a checkpoint."),
    Field("stop_grace", DURATION, "From SIGTERM to SIGKILL, the last checkpoint included.", "30s"),
    Field(
        "priority", _whole("a number", least=0, most=100), "Higher is placed first, 0 to 100.", "50"
    ),
    Field("tags", TEXTS, "Free names and values, for your own order."),
)

SYNONYMS: Mapping[str, str] = {
    "accelerators": "resources.gpus",
    "checkpoints": "checkpoint",
    "command": "run",
    "commands": "run",
    "cpu": "resources.cpus",
    "cwd": "workdir",
    "entrypoint": "run",
    "environment": "env",
    "envs": "env",
    "gpu": "resources.gpus",
    "labels": "tags",
    "max_restarts": "retry.on_errors",
    "max_retries": "retry.on_errors",
    "mem": "resources.memory",
    "nnodes": "nodes",
    "num_nodes": "nodes",
    "script": "run",
    "timeout": "max_duration",
    "workers": "nodes",
    "working_dir": "workdir",
}
"""What other launchers call it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One field, flat, for reference tables."""

    path: str
    """``checkpoint.every``."""
    words: str
    default: str
    help: str
    schema: Mapping[str, Any] = field(default_factory=dict)


def walk() -> Iterator[Reference]:
    """Every field in the order of the reference; sections are named by their fields' paths."""
    for item in FIELDS:
        if isinstance(item, Field):
            yield Reference(item.name, item.kind.words, item.default, item.help, item.kind.schema)
            continue
        for inner in item.fields:
            path = f"{item.name}.{inner.name}"
            yield Reference(path, inner.kind.words, inner.default, inner.help, inner.kind.schema)


def json_schema() -> dict[str, Any]:
    """For editors: JSON Schema (draft 2020-12) of a job file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dtp job",
        "type": "object",
        "properties": {item.name: _schema_of(item) for item in FIELDS},
        "oneOf": [{"required": ["run"]}, {"required": ["task"]}],
        "additionalProperties": False,
    }


def _schema_of(item: Field | Section) -> dict[str, Any]:
    if isinstance(item, Field):
        default = f" Default: {item.default}." if item.default else ""
        return {"description": item.help + default, **item.kind.schema}
    return {
        "description": item.help,
        "type": "object",
        "properties": {inner.name: _schema_of(inner) for inner in item.fields},
        "additionalProperties": False,
    }
