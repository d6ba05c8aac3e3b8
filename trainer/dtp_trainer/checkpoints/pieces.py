"""Tensors of which every rank holds a part, and how they become whole again at any world size.

A piece is written as a tensor of its own, named ``<name>#<first row>``; the manifest's structure
says how large the whole is. So a file of pieces is an ordinary safetensors file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from dtp_trainer.checkpoints.tensorfile import Malformed, Span, own_room

_PIECE = re.compile(r"(.+)#(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """This rank's part of a tensor that ranks hold between them; one object stands for one tensor.

    All ranks give the same `shape`, `dtype` and `stride` at the same place of their state, whatever
    they hold, and their rows together are the whole, each row once.
    """

    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    start: int
    """The first row, along dimension 0, that this rank holds."""
    data: torch.Tensor | None
    """The rows from `start` on; None, or no elements: this rank holds nothing. The whole of a
    number has no dimension, and neither has its only piece."""
    stride: tuple[int, ...] | None = None
    """Of the whole, where it is dense but not contiguous."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What a structure says of a tensor that is kept in pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


Part: TypeAlias = Callable[[str, tuple[int, ...]], tuple[int, int] | None]
"""Which rows, from the first to before the last, a reader wants of the tensor of that name (as it
is in the files) and of that shape; None: all of it. No rows are wanted from 0 to 0."""


class MissingPiece(ValueError):
    """Rows that no file has, or that two have; the message names the tensor."""


def piece_name(name: str, start: int) -> str:
    return f"{name}#{start}"


def is_piece_name(name: str) -> bool:
    """
    >>> is_piece_name("shared.model.weight#12"), is_piece_name("shared.model.weight")
    (True, False)
    """
    return _PIECE.fullmatch(name) is not None


class Assembly:
    """Tensors filled in place while the files of all ranks are read: whole, or a reader's part."""

    def __init__(self, wanted: Mapping[str, Whole], part: Part | None = None) -> None:
        """`wanted` by name, as `tree.pieces_in` finds them."""
        self._wanted = wanted
        self._kept = {name: _rows(name, whole, part) for name, whole in wanted.items()}
        self._tensors: dict[str, torch.Tensor] = {}
        self._filled: dict[str, list[tuple[int, int]]] = {name: [] for name in wanted}

    def has(self, name: str) -> bool:
        """A tensor of that name in a file belongs here."""
        return self._place(name) is not None

    def room(self, span: Span) -> torch.Tensor:
        """Memory of bytes for a tensor of a file: where it belongs, when it is a piece that is
        wanted from end to end.

        Raises:
            Malformed: it does not fit into its whole.
        """
        place = self._place(span.name)
        if place is None:
            return own_room(span)
        name, start = place
        whole = self._wanted[name]
        stop = start + (span.shape[0] if span.shape else 1)
        fits = (len(span.shape), span.shape[1:]) == (len(whole.shape), whole.shape[1:])
        if not fits or span.dtype is not whole.dtype or stop > whole.rows:
            raise Malformed(f"has a piece {span.name} that does not fit its whole")
        self._filled[name].append((start, stop))
        first, last = self._kept[name]
        if not first <= start <= stop <= last:
            return own_room(span)
        memory = self._tensor(name).reshape(-1).view(torch.uint8)
        return memory[(start - first) * whole.row_bytes : (stop - first) * whole.row_bytes]

    def take(self, name: str, piece: torch.Tensor) -> None:
        """What was read of a piece: the rows that are wanted, where `room` gave it no place."""
        whole, start = self._place(name) or (name, 0)
        first, last = self._kept[whole]
        stop = start + (len(piece) if piece.dim() else 1)
        low, high = max(first, start), min(last, stop)
        if low < high and (low, high) != (start, stop):
            self._tensor(whole)[low - first : high - first] = piece[low - start : high - start]

    def tensors(self) -> dict[str, torch.Tensor | Piece]:
        """All of them, whole; a `Piece` where only a part was wanted.

        Raises:
            MissingPiece: rows were in none of the files that were read, or in two.
        """
        for name, whole in self._wanted.items():
            if math.prod(whole.shape):
                _check(name, whole, sorted(self._filled[name]))
        return {name: self._result(name) for name in self._wanted}

    def _result(self, name: str) -> torch.Tensor | Piece:
        whole, (first, last) = self._wanted[name], self._kept[name]
        if (first, last) == (0, whole.rows):
            return self._tensor(name)
        data = self._tensor(name) if first < last else None
        return Piece(whole.shape, whole.dtype, first, data)

    def _place(self, name: str) -> tuple[str, int] | None:
        found = _PIECE.fullmatch(name)
        if found is None or found[1] not in self._wanted:
            return None
        return found[1], int(found[2])

    def _tensor(self, name: str) -> torch.Tensor:
        """The rows that are kept."""
        if name not in self._tensors:
            whole, (first, last) = self._wanted[name], self._kept[name]
            shape = (last - first, *whole.shape[1:]) if whole.shape else ()
            self._tensors[name] = torch.empty(shape, dtype=whole.dtype)
        return self._tensors[name]


def part_of(name: str, tensor: torch.Tensor, part: Part | None) -> torch.Tensor | Piece:
    """What is wanted of a tensor that a file has whole, in memory of its own."""
    whole = Whole(tuple(tensor.shape), tensor.dtype)
    first, last = _rows(name, whole, part)
    if (first, last) == (0, whole.rows):
        return tensor
    data = tensor[first:last].clone() if first < last else None
    return Piece(whole.shape, whole.dtype, first, data)


def _rows(name: str, whole: Whole, part: Part | None) -> tuple[int, int]:
    wanted = part(name, whole.shape) if part else None
    return (0, whole.rows) if wanted is None else wanted


def _check(name: str, whole: Whole, filled: list[tuple[int, int]]) -> None:
    at = 0
    for start, stop in [*filled, (whole.rows, whole.rows)]:
        if start != at:
            first, last = sorted((start, at))
            where = "none of its files" if start > at else "two of its files"
            raise MissingPiece(f"rows {first} to {last - 1} of {name} are in {where}")
        at = stop
