"""The timeline of a job, newest first: what happened, and who wanted it."""

from __future__ import annotations

from collections.abc import Sequence

from dtp_engine.jobs import Event
from dtp_tui import labels
from dtp_tui.cleaning import harmless
from dtp_tui.labels import Tone
from dtp_tui.widgets.spans import Span
from dtp_tui.widgets.table import Column, LineTable, Row

COLUMNS = (
    Column("TIME", 8),
    Column("WHO", 10, grow=1, rank=1),
    Column("EVENT", 18, rank=2),
    Column("WHAT", 30, grow=8),
)
_GOOD = ("checkpoint", "generation_started", "succeeded")
_BAD = ("failed", "lost", "hang", "refused", "killed")


class EventsFeed(LineTable):
    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(COLUMNS, empty="Nothing has happened yet.", id=id)

    def show_events(self, events: Sequence[Event]) -> None:
        at_top = self.cursor == 0
        self.show([event_row(event) for event in reversed(events)])
        if at_top:
            self.cursor = 0


def event_row(event: Event) -> Row:
    text = "" if event.attempt == 0 else f"attempt {event.attempt}: "
    tone = event_tone(event.name)
    return Row(
        str(event.seq),
        (
            Span(labels.clock(event.at), Tone.QUIET),
            Span(event.actor, Tone.QUIET),
            Span(event.name.replace("_", " "), tone),
            Span(text + harmless(event.text) if tone is Tone.BAD else harmless(event.text)),
        ),
    )


def event_tone(name: str) -> Tone:
    if any(part in name for part in _BAD):
        return Tone.BAD
    return Tone.GOOD if name in _GOOD else Tone.BUSY
