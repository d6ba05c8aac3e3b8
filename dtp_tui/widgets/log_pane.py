"""The log of all ranks in one pane: follows its end until the reader scrolls up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.cache import LRUCache
from textual.containers import Vertical
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from dtp_tui.labels import Tone
from dtp_tui.widgets.lines import Lines
from dtp_tui.widgets.log_buffer import Level, LogBuffer, LogEntry, LogFilter
from dtp_tui.widgets.spans import TONES, Line, Span, Toned, joined

WIDEST = 1_000
"""Cells of a line that can be scrolled to."""
RANK_COLOURS = 6

_TONES = {
    Level.DEBUG: Tone.QUIET,
    Level.INFO: Tone.PLAIN,
    Level.WARNING: Tone.WARN,
    Level.ERROR: Tone.BAD,
}


class LogPane(ScrollView, Toned, can_focus=True):
    """Lines of a `LogBuffer`. Posts `Changed` when what it shows is to be described anew."""

    COMPONENT_CLASSES: ClassVar[set[str]] = TONES | {f"log--rank-{n}" for n in range(RANK_COLOURS)}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll_up", "Up", show=False),
        Binding("down,j", "scroll_down", "Down", show=False),
        Binding("left,h", "sideways(-20)", "Left", show=False),
        Binding("right,l", "sideways(20)", "Right", show=False),
        Binding("g,home", "scroll_home", "Oldest line", show=False),
        Binding("G,end", "follow_end", "Newest line", show=False),
        Binding("pageup,ctrl+b", "page_up", "Page up", show=False),
        Binding("pagedown,ctrl+f", "page_down", "Page down", show=False),
        Binding("f", "toggle_follow", "Follow", tooltip="follow the end, or stay"),
        Binding("e", "toggle_errors", "Errors", tooltip="warnings and errors only"),
        Binding("t", "toggle_times", "Times", tooltip="show the time of each line"),
        Binding(
            "full_stop",
            "turn_source(1)",
            "Next rank",
            key_display=".",
            tooltip="only the next rank's lines",
            show=False,
        ),
        Binding(
            "comma",
            "turn_source(-1)",
            "Previous rank",
            key_display=",",
            tooltip="only the previous rank's",
            show=False,
        ),
        Binding("a", "all_sources", "All ranks", tooltip="all ranks", show=False),
    ]

    follow: reactive[bool] = reactive(default=True, repaint=False)
    times: reactive[bool] = reactive(default=True)

    @dataclass
    class Changed(Message):
        pane: LogPane

    def __init__(self, *, buffer: LogBuffer | None = None, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(id=id)
        self.buffer = buffer or LogBuffer()
        self.unseen = 0
        """Lines that came below while the pane stood still."""
        self._strips: LRUCache[int, Strip] = LRUCache(512)
        self._widest = 0

    def append(self, entries: Sequence[LogEntry]) -> None:
        if not entries:
            return
        before = self.buffer.shown
        gone = self.buffer.extend(entries)
        came = self.buffer.shown - before + gone
        self._widest = max(self._widest, min(WIDEST, max(len(e.text) for e in entries)))
        self._resize_content()
        if self.follow:
            self._to_end()
            self.refresh()
        elif gone:
            self.scroll_to(y=max(0, self.scroll_offset.y - gone), animate=False, force=True)
        if not self.follow:
            self.unseen += came
        self.post_message(self.Changed(self))

    def replace_buffer(self, buffer: LogBuffer) -> None:
        """Begin anew, with another job's lines."""
        self.buffer, self.unseen, self._widest = buffer, 0, 0
        self._relay()

    def set_filter(self, wanted: LogFilter) -> None:
        """The line at the top stays at the top, as far as the filter keeps it."""
        row = int(self.scroll_offset.y)
        top = self.buffer.number(row) if row < self.buffer.shown else 0
        self.buffer.set_filter(wanted)
        self._relay(row=self.buffer.row_of(top))

    def watch_times(self) -> None:
        self._strips.clear()
        self._resize_content()

    def watch_follow(self) -> None:
        if self.follow:
            self.unseen = 0
            self._to_end()
        self.post_message(self.Changed(self))

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if self.size.height and round(old_value) != round(new_value):
            self.follow = round(new_value) >= self.max_scroll_y

    def on_resize(self) -> None:
        self._resize_content()
        if self.follow:
            self._to_end()

    def action_sideways(self, cells: int) -> None:
        self.scroll_to(x=self.scroll_offset.x + cells, animate=False, force=True)

    def action_follow_end(self) -> None:
        self.follow = True
        self._to_end()

    def action_toggle_follow(self) -> None:
        self.follow = not self.follow

    def action_toggle_errors(self) -> None:
        now = self.buffer.filter
        self.set_filter(replace(now, errors_only=not now.errors_only))

    def action_toggle_times(self) -> None:
        self.times = not self.times
        self.post_message(self.Changed(self))

    def action_turn_source(self, by: int) -> None:
        """Next or previous of: all, each worker, each rank."""
        choices = [None, *self.buffer.sources()]
        now = self.buffer.filter
        index = choices.index(now.source) if now.source in choices else 0
        self.set_filter(replace(now, source=choices[(index + by) % len(choices)]))

    def action_all_sources(self) -> None:
        self.set_filter(replace(self.buffer.filter, source=None))

    def render_line(self, y: int) -> Strip:
        x, row = int(self.scroll_offset.x), int(self.scroll_offset.y) + y
        width = self.size.width
        if row >= self.buffer.shown:
            return Strip.blank(width, self.rich_style)
        strip = self._strip(row)
        return self.grounded(strip.crop_extend(x, x + width, None))

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._strips.clear()

    def _strip(self, row: int) -> Strip:
        number = self.buffer.number(row)
        if (known := self._strips.get(number)) is not None:
            return known
        line = self.buffer.line(row)
        segments = [Segment(f" {line.source:<7} ", self._source_ink(line.source))]
        if self.times:
            stamp = time.strftime(" %H:%M:%S", time.localtime(line.at))
            segments.insert(0, Segment(stamp, self.ink(Tone.QUIET)))
        segments.append(Segment(line.text[:WIDEST], self.ink(_TONES[line.level])))
        strip = Strip(segments)
        self._strips[number] = strip
        return strip

    def _source_ink(self, source: str) -> Style:
        digits = source.removeprefix("rank")
        if not digits.isdecimal():
            return self.ink(Tone.QUIET)
        number = int(digits) % RANK_COLOURS
        return self.colour(f"log--rank-{number}")

    def _relay(self, *, row: int = 0) -> None:
        self._strips.clear()
        self._resize_content()
        if self.follow:
            self._to_end()
        else:
            self.scroll_to(y=row, animate=False, force=True)
        self.refresh()
        self.post_message(self.Changed(self))

    def _resize_content(self) -> None:
        prefix = 18 if self.times else 9
        self.virtual_size = Size(self._widest + prefix, self.buffer.shown)

    def _to_end(self) -> None:
        self.scroll_to(y=self.max_scroll_y, animate=False, force=True)


class LogView(Vertical):
    """A `LogPane` under one line that says what is shown of it."""

    DEFAULT_CSS = """
    LogView > LogPane { height: 1fr; }
    """

    def compose(self) -> ComposeResult:
        yield Lines(id="log-indicator")
        yield LogPane(id="log-pane")

    @property
    def pane(self) -> LogPane:
        return self.query_one(LogPane)

    def on_mount(self) -> None:
        self.on_log_pane_changed()

    def on_log_pane_changed(self) -> None:
        self.query_one("#log-indicator", Lines).show([indicator(self.pane)])


def indicator(pane: LogPane) -> Line:
    """``● following   all ranks   12 of 5,000 lines`` … ``▼ 37 new``."""
    buffer = pane.buffer
    wanted = buffer.filter
    follow = Span("● following", Tone.GOOD) if pane.follow else Span("○ standing still", Tone.WARN)
    groups = [(follow,), (Span(wanted.source or "all ranks"),)]
    if wanted.errors_only:
        groups.append((Span("warnings and errors", Tone.WARN),))
    if wanted.pattern:
        groups.append((Span(f"/{wanted.pattern}", Tone.BUSY),))
    groups.append((Span(_counted(buffer), Tone.QUIET),))
    badge = f"▼ {pane.unseen:,} new" if pane.unseen else ""
    return Line((Span(" "), *joined(groups)), (Span(badge, Tone.BUSY, strong=True), Span(" ")))


def _counted(buffer: LogBuffer) -> str:
    kept = (
        f"{buffer.shown:,} of {len(buffer):,}"
        if buffer.shown != len(buffer)
        else f"{len(buffer):,}"
    )
    lines = f"{kept} lines"
    return f"{lines} ({buffer.first:,} older not kept)" if buffer.first else lines
