"""The checkpoints of a job, newest first."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from dtp_trainer import wire
from dtp_tui import labels
from dtp_tui.labels import Tone
from dtp_tui.widgets.spans import Span
from dtp_tui.widgets.table import Column, LineTable, Row

COLUMNS = (
    Column("STEP", 9, right=True),
    Column("AGE", 6, right=True),
    Column("SIZE", 9, right=True),
    Column("CHECKED", 10),
    Column("KEPT", 4, rank=1),
    Column("VALUES", 18, grow=3),
    Column("WORLD", 5, right=True, rank=2),
    Column("ATTEMPT", 7, right=True, rank=3),
    Column("NAME", 18, rank=1),
)
_MOST_VALUES = 3


class CheckpointsTable(LineTable):
    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(COLUMNS, empty="No checkpoint yet.", id=id)

    def show_checkpoints(self, entries: Sequence[wire.CheckpointEntry], now: datetime) -> None:
        self.show([checkpoint_row(entry, now) for entry in reversed(entries)])


def checkpoint_row(entry: wire.CheckpointEntry, now: datetime) -> Row:
    return Row(
        entry.name,
        (
            Span(f"{entry.step:,}", strong=True),
            Span(labels.age(entry.at, now), Tone.QUIET),
            Span(labels.size(entry.bytes)),
            checked(entry),
            Span("◆" if entry.pinned else "", Tone.BUSY),
            Span(_values(entry)),
            Span(str(entry.world_size), Tone.QUIET),
            Span(str(entry.attempt), Tone.QUIET),
            Span(entry.name, Tone.QUIET),
        ),
    )


def checked(entry: wire.CheckpointEntry) -> Span:
    """Whether its checksums were compared since it was written."""
    if entry.verified is None:
        return Span("not yet", Tone.QUIET)
    return Span("✓ good", Tone.GOOD) if entry.verified else Span("✗ damaged", Tone.BAD)


def newest_good(entries: Sequence[wire.CheckpointEntry]) -> wire.CheckpointEntry | None:
    """Of those not known to be damaged, the one that a resume starts from."""
    good = [entry for entry in entries if entry.verified is not False]
    return max(good, key=lambda entry: (entry.generation, entry.step), default=None)


def _values(entry: wire.CheckpointEntry) -> str:
    shown = list(entry.values.items())[:_MOST_VALUES]
    return "  ".join(f"{name} {labels.value(value, name)}" for name, value in shown)
