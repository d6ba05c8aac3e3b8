"""From which checkpoint a job should go on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from textual import on
from textual.widget import Widget
from textual.widgets import Button

from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_tui import consequences
from dtp_tui.screens.confirm import Dialog
from dtp_tui.widgets.checkpoints_table import CheckpointsTable, newest_good
from dtp_tui.widgets.table import LineTable


class ResumeDialog(Dialog[wire.CheckpointEntry]):
    """The newest good one is chosen beforehand; enter on a row goes on to the buttons."""

    CSS_PATH = ["confirm.tcss", "resume.tcss"]  # noqa: RUF012 - as textual declares it

    def __init__(
        self, view: JobView, entries: Sequence[wire.CheckpointEntry], now: datetime
    ) -> None:
        self._view, self._entries, self._now = view, tuple(entries), now
        self._newest = newest_good(entries)
        super().__init__(consequences.resume(view, self._newest, self._newest, now))

    def compose_choice(self) -> Iterable[Widget]:
        yield CheckpointsTable(id="choice")

    def begin(self) -> None:
        table = self.query_one(CheckpointsTable)
        table.show_checkpoints(self._entries, self._now)
        if self._newest is not None:
            table.select(self._newest.name)
        table.styles.height = min(10, len(self._entries) + 1)
        table.focus()

    def answer(self) -> wire.CheckpointEntry | None:
        key = self.query_one(CheckpointsTable).key
        return next((entry for entry in self._entries if entry.name == key), None)

    @on(LineTable.Highlighted)
    def _chosen(self) -> None:
        self.rewrite(consequences.resume(self._view, self.answer(), self._newest, self._now))

    @on(LineTable.Opened)
    def _settled(self) -> None:
        self.query_one("#cancel", Button).focus()
