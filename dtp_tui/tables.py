"""Aligned columns of text, as wide as the terminal allows; pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dtp_tui.labels import Label, Tone

Paint: TypeAlias = Callable[[str, Tone], str]


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    tone: Tone = Tone.PLAIN


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    right: bool = False
    drop: int = 0
    """On a narrow terminal the column with the highest number leaves first; 0 never leaves."""


Row = Sequence[Cell | Label | str]


def cell(item: Cell | Label | str) -> Cell:
    if isinstance(item, Label):
        return Cell(str(item), item.tone)
    return Cell(item) if isinstance(item, str) else item


def cells_wide(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def lay_out(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    width: int | None,
    paint: Paint = lambda text, _: text,
) -> list[str]:
    """Title line and rows, at most `width` cells wide (None: as wide as they are)."""
    kept = list(range(len(columns)))
    widths = [
        max(cells_wide(text) for text in (column.title, *(row[i].text for row in rows)))
        for i, column in enumerate(columns)
    ]
    while width is not None and _total(widths, kept) > width:
        leaving = max(kept, key=lambda i: columns[i].drop)
        if columns[leaving].drop == 0:
            _shrink(widths, kept, width)
            break
        kept.remove(leaving)
    titles = [Cell(column.title, Tone.QUIET) for column in columns]
    return [_line(columns, row, widths, kept, paint) for row in (titles, *rows)]


def _total(widths: Sequence[int], kept: Sequence[int]) -> int:
    return sum(widths[i] for i in kept) + 2 * (len(kept) - 1)


def _shrink(widths: list[int], kept: Sequence[int], width: int) -> None:
    """Take from the widest column until the row fits."""
    while _total(widths, kept) > width:
        widest = max(kept, key=lambda i: widths[i])
        if widths[widest] <= 4:
            return
        widths[widest] -= 1


def _line(
    columns: Sequence[Column],
    row: Sequence[Cell],
    widths: Sequence[int],
    kept: Sequence[int],
    paint: Paint,
) -> str:
    parts: list[str] = []
    for i in kept:
        text = shorten(row[i].text, widths[i])
        room = " " * (widths[i] - cells_wide(text))
        painted = paint(text, row[i].tone)
        last = i == kept[-1] and not columns[i].right
        parts.append(room + painted if columns[i].right else painted + ("" if last else room))
    return "  ".join(parts).rstrip()


def shorten(text: str, width: int) -> str:
    """At most `width` cells, with an ellipsis where something is missing."""
    if cells_wide(text) <= width:
        return text
    while text and cells_wide(text) > width - 1:
        text = text[:-1]
    return text + "…"
