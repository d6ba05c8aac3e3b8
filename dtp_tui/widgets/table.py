"""A table on the line API: fixed widths, rows known by key, and only changed rows repainted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from dtp_tui.labels import Tone
from dtp_tui.widgets.spans import TONES, Line, Span, Toned, fit

GAP = 2


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    width: int
    """Least width in cells."""
    grow: int = 0
    """Share of the room that is left over."""
    right: bool = False
    """Numbers stand at the right."""
    rank: int = 0
    """When there is no room, columns of the highest rank go first; rank 0 always stays."""


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    cells: tuple[Span, ...]
    """One for each column."""


def layout(columns: Sequence[Column], width: int) -> Mapping[int, int]:
    """Index of each column that fits in `width` cells → its width."""
    kept = list(range(len(columns)))
    while _needed(columns, kept) > width:
        droppable = [i for i in kept if columns[i].rank]
        if not droppable:
            break
        kept.remove(max(droppable, key=lambda i: (columns[i].rank, i)))
    spare = max(0, width - _needed(columns, kept))
    shares = sum(columns[i].grow for i in kept)
    return {
        i: columns[i].width + (spare * columns[i].grow // shares if shares else 0) for i in kept
    }


def _needed(columns: Sequence[Column], kept: Sequence[int]) -> int:
    return sum(columns[i].width for i in kept) + GAP * max(0, len(kept) - 1)


class LineTable(ScrollView, Toned, can_focus=True):
    """Rows with a cursor. Posts `Highlighted` when it moves and `Opened` on enter."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "table--header",
        "table--cursor",
        "table--resting",
    } | TONES
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("g,home", "move_to(0)", "First", show=False),
        Binding("G,end", "move_to(-1)", "Last", show=False),
        Binding("pageup,ctrl+b", "page(-1)", "Page up", show=False),
        Binding("pagedown,ctrl+f", "page(1)", "Page down", show=False),
        Binding("enter", "open", "Open", show=False),
    ]

    cursor: reactive[int] = reactive(0, repaint=False)

    @dataclass
    class Highlighted(Message):
        table: LineTable
        key: str

        @property
        def control(self) -> LineTable:
            return self.table

    @dataclass
    class Opened(Highlighted):
        pass

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        empty: str = "Nothing here yet.",
        id: str | None = None,  # noqa: A002 - Textual's own name
    ) -> None:
        super().__init__(id=id)
        self._columns = tuple(columns)
        self._widths: Mapping[int, int] = {}
        self._rows: tuple[Row, ...] = ()
        self._empty = empty

    @property
    def rows(self) -> tuple[Row, ...]:
        return self._rows

    @property
    def key(self) -> str | None:
        """Of the row under the cursor."""
        return self._rows[self.cursor].key if self.cursor < len(self._rows) else None

    def show(self, rows: Sequence[Row], *, empty: str | None = None) -> None:
        """Replace the rows; the cursor stays on its key, unchanged rows are not repainted."""
        before, key, old_empty = self._rows, self.key, self._empty
        self._rows = tuple(rows)
        self._empty = old_empty if empty is None else empty
        if len(before) != len(self._rows):
            self._measure()
            self.refresh()
        elif self._empty != old_empty:
            self.refresh()
        for index, (old, new) in enumerate(zip(before, self._rows, strict=False)):
            if old != new:
                self._repaint(index)
        self._follow(key)

    def select(self, key: str) -> None:
        """Move the cursor to a row, if it is there."""
        self._follow(key)

    def watch_cursor(self, before: int, after: int) -> None:
        self._repaint(before)
        self._repaint(after)
        self._reveal()
        if self.key is not None:
            self.post_message(self.Highlighted(self, self.key))

    def validate_cursor(self, cursor: int) -> int:
        return max(0, min(cursor, len(self._rows) - 1))

    def action_move(self, by: int) -> None:
        self.cursor += by

    def action_move_to(self, index: int) -> None:
        self.cursor = index if index >= 0 else len(self._rows) - 1

    def action_page(self, by: int) -> None:
        self.cursor += by * max(1, self.size.height - 2)

    def action_open(self) -> None:
        if self.key is not None:
            self.post_message(self.Opened(self, self.key))

    def on_click(self, event: events.Click) -> None:
        index = int(self.scroll_offset.y) + event.y - 1
        if event.y == 0 or not 0 <= index < len(self._rows):
            return
        self.cursor = index
        if event.chain > 1:
            self.action_open()

    def on_resize(self) -> None:
        self._measure()
        self.refresh()

    def on_focus(self) -> None:
        self._repaint(self.cursor)

    def on_blur(self) -> None:
        self._repaint(self.cursor)

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if y == 0:
            return self._header(width)
        index = int(self.scroll_offset.y) + y - 1
        if not self._rows and y == 2:
            return self.paint(Line((Span(" " + self._empty, Tone.QUIET),)), width)
        if index >= len(self._rows):
            return Strip.blank(width, self.rich_style)
        return self._row(index, width)

    def _header(self, width: int) -> Strip:
        style = self.colour("table--header")
        cells = (Span(self._columns[i].title) for i in self._widths)
        texts = [text for text, _ in self._laid_out(tuple(cells))]
        return self.grounded(
            Strip([Segment(fit(" " + "".join(texts).rstrip(), width), style)], width)
        )

    def _row(self, index: int, width: int) -> Strip:
        row = self._rows[index]
        shown = tuple(row.cells[i] for i in self._widths)
        segments = [Segment(" ")]
        segments.extend(
            Segment(text, self.ink(span.tone, strong=span.strong))
            for text, span in self._laid_out(shown)
        )
        strip = Strip(segments).adjust_cell_length(width)
        if index == self.cursor:
            name = "table--cursor" if self.has_focus else "table--resting"
            ground = self.get_component_rich_style(name).bgcolor
            strip = strip.apply_style(Style(bgcolor=ground))
        return self.grounded(strip)

    def _laid_out(self, cells: Sequence[Span]) -> Iterator[tuple[str, Span]]:
        for (index, width), span in zip(self._widths.items(), cells, strict=True):
            text = fit(span.text, width)
            if self._columns[index].right and cell_len(span.text) <= width:
                text = " " * (width - cell_len(span.text)) + span.text
            yield text + " " * GAP, span

    def _measure(self) -> None:
        width = self.size.width
        self._widths = layout(self._columns, max(0, width - 2))
        self.virtual_size = Size(width, len(self._rows) + 1)

    def _repaint(self, index: int) -> None:
        y = index - int(self.scroll_offset.y) + 1
        if 1 <= y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    def _follow(self, key: str | None) -> None:
        keys = [row.key for row in self._rows]
        self.cursor = keys.index(key) if key in keys else self.cursor

    def _reveal(self) -> None:
        top, page = int(self.scroll_offset.y), self.size.height - 1
        if page <= 0:
            return
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False, force=True)
        elif self.cursor >= top + page:
            self.scroll_to(y=self.cursor - page + 1, animate=False, force=True)
