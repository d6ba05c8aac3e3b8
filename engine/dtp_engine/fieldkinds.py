"""How one value of a job file is read, and how an editor should check it.

A `Kind` reads a value; a `Field` gives it a name, a default in words and a line of help; a
`Section` is a group of fields. The table of all fields is in `specfields`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dtp_engine import quantities
from dtp_engine.errors import SpecError
from dtp_engine.yamltree import Items, Scalar, Table, Tree, kind_of

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
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
    switch: bool = False
    """`name: true` is the section with nothing said in it."""


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


def whole(words: str, *, least: int, most: int) -> Kind:
    def parse(text: str) -> int:
        return quantities.parse_whole(text, least=least, most=most)

    return kind(words, parse, type="integer", minimum=least, maximum=most)


def unlimited(words: str, *, most: int) -> Kind:
    def parse(text: str) -> int | None:
        return None if text == "unlimited" else quantities.parse_whole(text, least=0, most=most)

    choices = [{"type": "integer", "minimum": 0, "maximum": most}, {"const": "unlimited"}]
    return kind(words, parse, oneOf=choices)


def matching(words: str, pattern: str) -> Kind:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f'expected {words}, found "{text}"')
        return text

    return kind(words, parse, type="string", pattern=pattern)


def choice(words: str, options: Sequence[str], **aliases: str) -> Kind:
    """One of `options`; `aliases` are other ways to write some of them, YAML's booleans mostly."""

    def parse(text: str) -> str:
        wanted = aliases.get(text, text)
        for option in options:
            if option == wanted:
                return option
        raise ValueError(f'expected {words}, found "{text}"')

    booleans = [text == "true" for text in aliases if text in ("true", "false")]
    return kind(words, parse, enum=[*options, *booleans])


def number(words: str, *, above: float, most: float) -> Kind:
    return kind(
        words,
        lambda text: quantities.parse_number(text, above=above, most=most),
        type="number",
        exclusiveMinimum=above,
        maximum=most,
    )


def parse_switch(text: str) -> bool:
    """YAML's words for yes and no."""
    lower = text.lower()
    if lower not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError(f'expected true or false, found "{text}"')
    return lower in ("true", "yes", "on")


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


def _labels(name: str, tree: Tree) -> tuple[str, ...]:
    if not isinstance(tree, Items):
        raise wrong(
            tree, name, f"expected a list such as [baseline, vision], found {kind_of(tree)}"
        )
    return tuple(TEXT.read(name, item) for item in tree.items)


def _names(name: str, tree: Tree) -> tuple[str, ...]:
    if isinstance(tree, Scalar) and tree.empty:
        return ()
    if not isinstance(tree, Items):
        raise wrong(tree, name, f"expected a list such as [WANDB_API_KEY], found {kind_of(tree)}")
    read = matching("a variable's name", VARIABLE_PATTERN).read
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

NAME = matching("letters, digits, dots, dashes; at most 63", NAME_PATTERN)
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
CPUS = number("a number of cores", above=0, most=4096)
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
LABELS = Kind("a list of words", {"type": "array", "items": {"type": "string"}}, _labels)
SWITCH = kind("true or false", parse_switch, type="boolean")
