"""A chart of a few series: title with the newest values, y labels, dots, x labels, marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip

from dtp_engine.series import Axis, Bucket, Mark, MarkKind
from dtp_tui.labels import Tone
from dtp_tui.widgets.braille import Canvas, Scale, draw, nice_scale, step_ticks, time_ticks
from dtp_tui.widgets.spans import Line, Span, Toned, fit, paint

LABEL_WIDTH = 7
SERIES_COLOURS = 4
LEAST_HEIGHT = 4


@dataclass(frozen=True, slots=True)
class Curve:
    """One series of a plot."""

    name: str
    newest: str
    """Its last value in words, for the legend."""
    view: Callable[[int], Sequence[Bucket]]
    """Number of columns → buckets over the plot's [start, end]."""


@dataclass(frozen=True, slots=True)
class Plot:
    """All that a chart shows; a value."""

    title: str
    curves: tuple[Curve, ...] = ()
    start: float = 0.0
    end: float = 0.0
    axis: Axis = Axis.TIME
    marks: tuple[Mark, ...] = ()
    words: Callable[[float], str] = str
    """Labels of the y axis."""
    from_zero: bool = False
    empty: str = "no data yet"


class Chart(Toned):
    """Draws a `Plot`; repaints only the rows in which a cell changed."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "chart--grid",
        *(f"chart--curve-{n}" for n in range(1, SERIES_COLOURS + 1)),
    }

    def __init__(self, title: str, *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(id=id)
        self._plot = Plot(title)
        self._strips: list[Strip] = []

    def show(self, plot: Plot) -> None:
        self._plot = plot
        before, self._strips = self._strips, self._draw()
        for y, (old, new) in enumerate(zip_longest(before, self._strips)):
            if old != new:
                self.refresh(Region(0, y, self.size.width, 1))

    def on_resize(self) -> None:
        self._strips = self._draw()
        self.refresh()

    def notify_style_update(self) -> None:
        super().notify_style_update()
        if self.is_mounted and self._strips:
            self._strips = self._draw()

    def render_line(self, y: int) -> Strip:
        strip = self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width)
        return self.grounded(strip)

    def _draw(self) -> list[Strip]:
        width, height = self.size
        if height < LEAST_HEIGHT or width < LABEL_WIDTH + 12:
            return [self._title(width)] if height else []
        columns, rows = width - LABEL_WIDTH - 2, height - 2
        views = [tuple(curve.view(2 * columns)) for curve in self._plot.curves[:SERIES_COLOURS]]
        scale = y_scale(views, rows, from_zero=self._plot.from_zero)
        if scale is None:
            return self._without_data(width, height)
        canvas = Canvas(columns, rows)
        for owner, view in reversed(list(enumerate(views, start=1))):
            draw(canvas, view, scale.low, scale.high, owner=owner)
        labels = y_labels(scale, rows, self._plot.words)
        body = [self._plot_row(canvas, row, labels.get(row)) for row in range(rows)]
        return [self._title(width), *body, self._x_axis(columns)]

    def _title(self, width: int) -> Strip:
        inks = {c.name: self._curve_ink(n) for n, c in enumerate(self._plot.curves, start=1)}
        legend: list[Span] = []
        for curve in self._plot.curves[:SERIES_COLOURS]:
            text = f"{curve.name} {curve.newest}" if len(self._plot.curves) > 1 else curve.newest
            legend.append(Span(("  " if legend else "") + text, strong=True))
        by_text = dict(zip((span.text for span in legend), inks.values(), strict=False))

        def ink(span: Span) -> Style:
            return by_text.get(span.text) or self.ink(span.tone, strong=span.strong)

        needed = sum(cell_len(span.text) for span in legend) + len(self._plot.title) + 2
        indent = min(LABEL_WIDTH + 1, max(1, width - needed))
        title = Span(" " * indent + self._plot.title, strong=True)
        return paint(Line((title,), (*legend, Span(" "))), width, ink)

    def _without_data(self, width: int, height: int) -> list[Strip]:
        words = Line((Span(" " * (LABEL_WIDTH + 1) + self._plot.empty, Tone.QUIET),))
        blank = Strip.blank(width)
        rows = [blank] * (height - 1)
        rows[(height - 1) // 2 - 1] = self.paint(words, width)
        return [self._title(width), *rows]

    def _plot_row(self, canvas: Canvas, row: int, label: str | None) -> Strip:
        grid = self.colour("chart--grid")
        quiet = self.ink(Tone.QUIET)
        cells = self._background(canvas.width, grid, ticked=label is not None)
        for column in range(canvas.width):
            text, owner = canvas.cell(column, row)
            if owner:
                cells[column] = (text, self._curve_ink(owner))
        left = Segment((label or "").rjust(LABEL_WIDTH) + (" " if label is None else "┤"), quiet)
        return Strip([left, *_runs(cells)], LABEL_WIDTH + 1 + canvas.width)

    def _background(self, columns: int, grid: Style, *, ticked: bool) -> list[tuple[str, Style]]:
        cells = [("┈" if ticked else " ", grid)] * columns
        for mark in self._marks:
            column = self._column(mark, columns)
            if column is not None and mark.kind is not MarkKind.CHECKPOINT:
                cells[column] = ("┊", self._mark_ink(mark))
        return cells

    def _x_axis(self, columns: int) -> Strip:
        quiet = self.ink(Tone.QUIET)
        ticks = step_ticks if self._plot.axis is Axis.STEP else time_ticks
        cells = [(" ", quiet)] * columns
        for mark in self._marks:
            column = self._column(mark, columns)
            if column is not None:
                cells[column] = (_MARK_GLYPHS[mark.kind], self._mark_ink(mark))
        end = -1
        for column, label in ticks(self._plot.start, self._plot.end, columns):
            first = max(0, min(column - len(label) // 2, columns - len(label)))
            if first <= end:
                continue
            end = first + len(label)
            cells[first:end] = [(char, quiet) for char in label]
        return Strip([Segment(" " * (LABEL_WIDTH + 1)), *_runs(cells)], LABEL_WIDTH + 1 + columns)

    @property
    def _marks(self) -> list[Mark]:
        """Failures last: where several fall into one column, they are what is seen."""
        return sorted(self._plot.marks, key=lambda mark: mark.kind is MarkKind.FAILURE)

    def _column(self, mark: Mark, columns: int) -> int | None:
        position = mark.at if self._plot.axis is Axis.TIME else mark.step
        span = self._plot.end - self._plot.start
        if position is None or span <= 0 or not self._plot.start <= position <= self._plot.end:
            return None
        return int((position - self._plot.start) / span * (columns - 1))

    def _curve_ink(self, number: int) -> Style:
        number = (number - 1) % SERIES_COLOURS + 1
        return self.colour(f"chart--curve-{number}")

    def _mark_ink(self, mark: Mark) -> Style:
        return self.ink(_MARK_TONES[mark.kind])


_MARK_GLYPHS = {
    MarkKind.ATTEMPT: "▲",
    MarkKind.GENERATION: "△",
    MarkKind.CHECKPOINT: "▴",
    MarkKind.FAILURE: "✗",
}
_MARK_TONES = {
    MarkKind.ATTEMPT: Tone.QUIET,
    MarkKind.GENERATION: Tone.QUIET,
    MarkKind.CHECKPOINT: Tone.GOOD,
    MarkKind.FAILURE: Tone.BAD,
}


def y_scale(views: Sequence[Sequence[Bucket]], rows: int, *, from_zero: bool) -> Scale | None:
    """Round limits around everything finite; None when there is nothing finite."""
    lows = [b.low for view in views for b in view if math.isfinite(b.low)]
    highs = [b.high for view in views for b in view if math.isfinite(b.high)]
    if not lows or not highs:
        return None
    low, high = min(lows), max(highs)
    if from_zero and low >= 0:
        low, high = 0.0, high or 1.0
    return nice_scale(low, high, max(2, min(6, (rows + 1) // 3)))


def y_labels(scale: Scale, rows: int, words: Callable[[float], str]) -> dict[int, str]:
    """Row of the plot → label; the lowest tick stands on the last row."""
    span = (scale.high - scale.low) or 1.0
    labels = {}
    for tick in scale.ticks:
        row = rows - 1 - round((tick - scale.low) / span * (rows - 1))
        labels[row] = fit(words(tick), min(LABEL_WIDTH, cell_len(words(tick))))
    return labels


def _runs(cells: Sequence[tuple[str, Style]]) -> list[Segment]:
    """Neighbours of one style in one segment: each change of style costs bytes on the line."""
    segments: list[Segment] = []
    text, style = "", Style.null()
    for char, ink in cells:
        if ink is not style and ink != style and text:
            segments.append(Segment(text, style))
            text = ""
        text, style = text + char, ink
    segments.append(Segment(text, style))
    return segments
