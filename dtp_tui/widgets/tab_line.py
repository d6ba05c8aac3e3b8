"""The tabs of a screen in one line, numbered by the key that opens each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from textual import events
from textual.message import Message

from dtp_tui.labels import Tone
from dtp_tui.widgets.lines import Lines
from dtp_tui.widgets.spans import Line, Span


class TabLine(Lines):
    @dataclass
    class Chosen(Message):
        tab: str

    def __init__(self, tabs: Sequence[str], *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(id=id)
        self._tabs = tuple(tabs)

    def show_tab(self, active: str) -> None:
        spans = [Span(" ")]
        for number, tab in enumerate(self._tabs, start=1):
            here = tab == active
            spans.append(Span(f"{number} ", Tone.BUSY if here else Tone.QUIET, strong=here))
            spans.append(Span(tab.capitalize(), Tone.PLAIN if here else Tone.QUIET, strong=here))
            spans.append(Span("   "))
        self.show([Line(tuple(spans))])

    def on_click(self, event: events.Click) -> None:
        tab = tab_at(self._tabs, event.x)
        if tab is not None:
            self.post_message(self.Chosen(tab))


def tab_at(tabs: Sequence[str], x: int) -> str | None:
    """The tab whose words lie at this cell of the line."""
    start = 1
    for number, tab in enumerate(tabs, start=1):
        width = len(str(number)) + 1 + cell_len(tab)
        if start <= x < start + width:
            return tab
        start += width + 3
    return None
