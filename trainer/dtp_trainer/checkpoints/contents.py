"""What a checkpoint holds, read without torch: its tensors by the names that the script gave them.

A manifest's structure says which tensor stands where (`tree`); the header of each share says where
its bytes lie. Both are plain JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

from dtp_trainer.checkpoints.manifest import (
    DamagedCheckpoint,
    Manifest,
    Share,
    key_of,
    not_given,
)
from dtp_trainer.storage import NotFound, Storage, Unreadable

Json: TypeAlias = Any

_LONGEST_HEADER = 512 << 20
_PAIRS = ("~ordered", "~dict", "~counter")
_ITEMS = ("~tuple", "~set")


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor as it lies in the file of one rank, rows one after the other."""

    share: Share
    name: str
    dtype: str
    """As safetensors calls it: ``F32``, ``BF16`` …"""
    shape: tuple[int, ...]
    start: int
    stop: int
    """In bytes, from the beginning of the file."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where rows of a tensor lie, and the byte of the whole at which they begin."""

    held: Held
    at: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the state, whole, wherever its rows lie."""

    path: tuple[str, ...]
    """Where the script has it: ``("model", "0.weight")``, ``("optimizer", "state", "0", …)``."""
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return sum(part.held.stop - part.held.start for part in self.parts)


def tensors_of(storage: Storage, manifest: Manifest) -> list[Tensor]:
    """All tensors that the ranks share, in the order in which the script has them.

    A tensor that occurs several times (tied weights) is listed as often.

    Raises:
        DamagedCheckpoint: a file is missing, or does not fit the manifest.
    """
    held: dict[str, Held] = {}
    pieces: dict[str, list[tuple[int, Held]]] = {}
    for share in manifest.shares:
        for each in _headers(storage, manifest.name, share):
            held[each.name] = each
            name, mark, row = each.name.rpartition("#")
            if mark and row.isdigit():
                pieces.setdefault(name, []).append((int(row), each))
    try:
        return [_found(path, leaf, held, pieces) for path, leaf in leaves(manifest.state) if path]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(
            f"{manifest.name}: its files do not fit its manifest: {error!r}"
        ) from None


def leaves(structure: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Json]]:
    """What stands for a tensor in a structure, and where."""
    if isinstance(structure, list):
        for number, item in enumerate(structure):
            yield from leaves(item, (*path, str(number)))
    if not isinstance(structure, dict):
        return
    if "~tensor" in structure or "~pieces" in structure:
        yield path, structure
        return
    for mark in ("~array", "~complex", "~scalar"):
        if mark in structure:
            yield from leaves(structure[mark], path)
            return
    for mark in _PAIRS:
        if mark in structure:
            for key, item in structure[mark]:
                yield from leaves(item, (*path, _word(key)))
            return
    inner = next((structure[mark] for mark in _ITEMS if mark in structure), None)
    if inner is not None:
        yield from leaves(inner, path)
        return
    for key, item in structure.items():
        yield from leaves(item, (*path, key))


def without_tensors(structure: Json) -> Json:
    """The plain values of a structure, for people: learning rates, counts, names."""
    if isinstance(structure, list):
        return [without_tensors(item) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "~tensor" in structure or "~pieces" in structure:
        return None
    for mark in _PAIRS:
        if mark in structure:
            return {_word(key): without_tensors(item) for key, item in structure[mark]}
    first = next(iter(structure), "")
    if first.startswith("~"):
        return without_tensors(structure[first])
    return {key: without_tensors(item) for key, item in structure.items()}


def _word(key: Json) -> str:
    return key if isinstance(key, str) else json.dumps(key)


def _found(
    path: tuple[str, ...],
    leaf: Mapping[str, Json],
    held: Mapping[str, Held],
    pieces: Mapping[str, list[tuple[int, Held]]],
) -> Tensor:
    if "~tensor" in leaf:
        whole = held[leaf["~tensor"]]
        return Tensor(path, whole.dtype, whole.shape, (Part(whole, 0),))
    name, shape = leaf["~pieces"], tuple(leaf["shape"])
    parts: list[Part] = []
    rows, at = 0, 0
    for row, piece in sorted(pieces.get(name, []), key=lambda pair: pair[0]):
        if row != rows or piece.dtype != leaf["dtype"] or piece.shape[1:] != shape[1:]:
            raise ValueError(f"rows {rows} to {row} of {name}")
        parts.append(Part(piece, at))
        rows += piece.shape[0] if piece.shape else 1
        at += piece.stop - piece.start
    if math.prod(shape) and rows != (shape[0] if shape else 1):
        raise ValueError(f"{rows} rows of {name}")
    return Tensor(path, leaf["dtype"], shape, tuple(parts))


def _headers(storage: Storage, name: str, share: Share) -> list[Held]:
    try:
        with storage.open(key_of(name, share.file)) as file:
            return _read_header(file, share)
    except (NotFound, Unreadable) as error:
        raise not_given(name, share.file, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{name}/{share.file} is not a file of tensors") from None


def _read_header(file: IO[bytes], share: Share) -> list[Held]:
    """Raises ValueError, KeyError, TypeError, AttributeError for what is no safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(share.bytes - 8, _LONGEST_HEADER):
        raise ValueError
    entries = json.loads(file.read(length))
    base = 8 + length
    return [
        Held(
            share,
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            base + entry["data_offsets"][0],
            base + entry["data_offsets"][1],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    ]
