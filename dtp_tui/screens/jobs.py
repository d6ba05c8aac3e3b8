"""Home: all jobs, and on a tall terminal a look into the one under the cursor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.timer import Timer
from textual.widget import Widget

from dtp_engine.views import JobView
from dtp_tui.messages import ClusterPicture, JobPicture
from dtp_tui.screens.frame import Frame, crumb_line
from dtp_tui.widgets.jobs_table import JobsTable, filtered
from dtp_tui.widgets.overview import Overview
from dtp_tui.widgets.spans import Line
from dtp_tui.widgets.table import LineTable

SETTLE_S = 0.3
"""The cursor must rest on a job for so long before its charts are read."""


class JobsScreen(Frame):
    CSS_PATH = ["frame.tcss", "jobs.tcss"]  # noqa: RUF012 - as textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l", "open('logs')", "Logs", tooltip="the job's log"),
        Binding("q", "app.leave", "Quit", show=False),
    ]

    _settling: Timer | None = None
    _peeked: str | None = None

    def compose_body(self) -> Iterable[Widget]:
        yield JobsTable(id="jobs")
        yield Overview(id="peek")

    @property
    def table(self) -> JobsTable:
        return self.query_one(JobsTable)

    def selected(self) -> JobView | None:
        picture = self.dtp.cluster
        if picture is None or not self.is_mounted:
            return None
        key = self.table.key
        return next((view for view in picture.jobs if view.job.id == key), None)

    def crumbs(self) -> Line:
        picture = self.dtp.cluster
        views = picture.jobs if picture else ()
        found = f"{len(filtered(views, self.wanted))} of {len(views)}"
        return crumb_line("Jobs", wanted=self.wanted, found=found)

    def on_mount(self) -> None:
        self.focus_body()

    def came_to_front(self) -> None:
        self._peeked = None
        self._settle()

    def show_jobs(self, picture: ClusterPicture) -> None:
        self.table.show_jobs(picture.jobs, picture.now, wanted=self.wanted)
        self.query_one("#peek").set_class(not picture.jobs, "-empty")
        if self._peeked is None and self._settling is None:
            self._settle()
        self.refresh_bindings()

    def show_job(self, picture: JobPicture) -> None:
        if picture.view.job.id == self._peeked:
            self.query_one(Overview).show_job(picture)

    def apply_filter(self, wanted: str) -> None:
        if self.dtp.cluster is not None:
            self.show_jobs(self.dtp.cluster)

    def focus_body(self) -> None:
        self.table.focus()

    def back(self) -> None:
        """There is nothing behind home."""

    @on(LineTable.Highlighted)
    def _settle(self) -> None:
        self.refresh_bindings()
        if self._settling is not None:
            self._settling.stop()
        self._settling = self.set_timer(SETTLE_S, self._peek)

    @on(LineTable.Opened)
    def _opened(self, event: LineTable.Opened) -> None:
        self.dtp.open_job(event.key)

    def action_open(self, tab: str = "overview") -> None:
        if self.table.key is not None:
            self.dtp.open_job(self.table.key, tab)

    def on_resize(self) -> None:
        self._settle()

    def _peek(self) -> None:
        self._settling = None
        if self.dtp.front is not self:
            return
        self._peeked = self.table.key if self.has_class("-tall") else None
        self.dtp.read_job(self._peeked)
