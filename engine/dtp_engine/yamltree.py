"""YAML text → a small tree in which every value knows where it was written; one-line errors.

PyYAML composes the text; nothing is constructed, so a scalar keeps the characters that were typed
(``LR: 0.10`` is "0.10") and no tag can run code. Anchors, aliases and ``<<`` merges work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml

from dtp_engine.errors import SpecError

LARGEST_FILE_BYTES = 1_000_000
MOST_NODES = 10_000
"""After aliases are followed; a file that needs more is an attack or an accident."""


@dataclass(frozen=True, slots=True)
class Scalar:
    where: str
    """``job.yaml:12``, or ``--set a.b=c``."""
    text: str
    empty: bool
    """Nothing, ``~`` or ``null`` was written; a quoted empty text is not empty."""


@dataclass(frozen=True, slots=True)
class Items:
    where: str
    items: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    where: str
    """Of the key."""
    key: str
    value: Tree


@dataclass(frozen=True, slots=True)
class Table:
    where: str
    entries: tuple[Entry, ...]

    def get(self, key: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.key == key), None)


Tree: TypeAlias = Scalar | Items | Table


def kind_of(tree: Tree) -> str:
    """For messages: what was found instead."""
    if isinstance(tree, Table):
        return "a mapping"
    if isinstance(tree, Items):
        return "a list"
    return "nothing" if tree.empty else f'"{_short(tree.text)}"'


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "…"


def read_table(path: Path, *, shown_as: str | None = None) -> Table:
    """The mapping that a file holds. A `SpecError` begins with ``file:`` or ``file:line:``."""
    shown = shown_as or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{shown}: no such file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise SpecError(f"{shown}: this is a folder, not a file") from None
    except OSError as error:
        raise SpecError(f"{shown}: cannot be read: {error.strerror}") from error
    return parse_table(raw, shown)


def _nearest_file(path: Path) -> str:
    import difflib  # noqa: PLC0415 - only an error needs it

    try:
        there = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    return f'; did you mean "{path.parent / near[0]}"?' if near else ""


def parse_table(raw: bytes, shown: str) -> Table:
    """`shown` is how messages name the file."""
    if len(raw) > LARGEST_FILE_BYTES:
        raise SpecError(f"{shown}: larger than {LARGEST_FILE_BYTES // 1000} kB")
    text = _decode(raw, shown)
    tree = _compose(text, shown)
    if tree is None or (isinstance(tree, Scalar) and tree.empty):
        raise SpecError(f"{shown}:1: the file is empty")
    if not isinstance(tree, Table):
        raise SpecError(f"{tree.where}: expected `field: value` lines, found {kind_of(tree)}")
    return tree


def parse_value(text: str, where: str) -> Tree:
    """A value written on a command line; every part of it carries `where`."""
    node = _compose(text, where, lines=False)
    return node if node is not None else Scalar(where, "", empty=True)


def _decode(raw: bytes, shown: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SpecError(
            f"{shown}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None


def _compose(text: str, shown: str, *, lines: bool = True) -> Tree | None:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise SpecError(_explain(error, text, shown, lines=lines)) from None
    except yaml.YAMLError as error:
        raise SpecError(f"{shown}: not YAML: {_one_line(error)}") from None
    except RecursionError:
        raise SpecError(f"{shown}: nested too deeply") from None
    return None if node is None else _Reader(shown, lines=lines).read(node)


def _explain(error: yaml.MarkedYAMLError, text: str, shown: str, *, lines: bool) -> str:
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    where = f"{shown}:{line + 1}" if lines else shown
    rows = text.splitlines()
    row = rows[line] if line < len(rows) else ""
    indent = row[: len(row) - len(row.lstrip())]
    if "\t" in indent or "'\\t'" in (error.problem or ""):
        return f"{where}: a tab; YAML is indented with spaces only"
    if "undefined alias" in (error.problem or ""):
        return f"{where}: {error.problem}; define it before with &"
    problem = _one_line(error.problem or "cannot be understood")
    hint = '; put quotes around a value that holds ": "' if "mapping values" in problem else ""
    return f"{where}: not YAML: {problem}{hint}"


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())


class _Reader:
    """One composed document → tree; follows aliases, counts nodes, refuses loops."""

    def __init__(self, shown: str, *, lines: bool) -> None:
        self._shown = shown
        self._lines = lines
        self._left = MOST_NODES
        self._open: set[int] = set()

    def _where(self, node: yaml.Node) -> str:
        return f"{self._shown}:{node.start_mark.line + 1}" if self._lines else self._shown

    def read(self, node: yaml.Node) -> Tree:
        where = self._where(node)
        self._left -= 1
        if self._left < 0:
            raise SpecError(f"{where}: more than {MOST_NODES} values once aliases are followed")
        if id(node) in self._open or len(self._open) > 50:
            raise SpecError(f"{where}: an anchor that contains itself, or nesting beyond 50 levels")
        if isinstance(node, yaml.ScalarNode):
            return Scalar(where, node.value, empty=node.tag.endswith(":null"))
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return Items(where, tuple(self.read(item) for item in node.value))
            assert isinstance(node, yaml.MappingNode)
            return self._table(node, where)
        finally:
            self._open.discard(id(node))

    def _table(self, node: yaml.MappingNode, where: str) -> Table:
        own: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        for key, value in node.value:
            if key.tag.endswith(":merge"):
                for entry in self._merged(value):
                    merged.setdefault(entry.key, entry)
                continue
            entry = self._entry(key, value)
            if entry.key in own:
                first = own[entry.key].where
                raise SpecError(f"{entry.where}: {entry.key}: written twice; first at {first}")
            own[entry.key] = entry
        return Table(where, (*own.values(), *(e for k, e in merged.items() if k not in own)))

    def _entry(self, key: yaml.Node, value: yaml.Node) -> Entry:
        if not isinstance(key, yaml.ScalarNode):
            raise SpecError(f"{self._where(key)}: a field name must be plain text")
        return Entry(self._where(key), key.value, self.read(value))

    def _merged(self, node: yaml.Node) -> Iterator[Entry]:
        for part in node.value if isinstance(node, yaml.SequenceNode) else (node,):
            tree = self.read(part)
            if not isinstance(tree, Table):
                raise SpecError(f"{tree.where}: << merges mappings, found {kind_of(tree)}")
            yield from tree.entries
