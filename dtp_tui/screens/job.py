"""One job: overview, logs, workers, checkpoints, events and its configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import ContentSwitcher

from dtp_engine.views import JobView
from dtp_tui import labels
from dtp_tui.commandline import TABS
from dtp_tui.messages import ClusterPicture, JobPicture, LinesArrived
from dtp_tui.screens.frame import Frame, crumb_line
from dtp_tui.widgets.checkpoints_table import CheckpointsTable
from dtp_tui.widgets.config_table import ConfigTable
from dtp_tui.widgets.events_feed import EventsFeed
from dtp_tui.widgets.log_buffer import LogBuffer
from dtp_tui.widgets.log_pane import LogPane, LogView
from dtp_tui.widgets.overview import Overview
from dtp_tui.widgets.spans import Line, Span, label_span
from dtp_tui.widgets.tab_line import TabLine
from dtp_tui.widgets.workers_table import WorkersTable


class JobScreen(Frame):
    CSS_PATH = ["frame.tcss", "job.tcss"]  # noqa: RUF012 - as textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(n), f"tab('{tab}')", tab.capitalize(), show=False)
            for n, tab in enumerate(TABS, start=1)
        ),
        Binding("tab", "turn(1)", "Next tab", tooltip="next tab; 1 … 6 choose one", show=False),
        Binding("shift+tab", "turn(-1)", "Previous tab", show=False),
        Binding("q", "back", "Back", show=False),
    ]

    def __init__(self, job_id: str, tab: str = "overview") -> None:
        super().__init__()
        self.job_id = job_id
        self.tab = tab
        self._picture: JobPicture | None = None

    def compose_body(self) -> Iterable[Widget]:
        yield TabLine(TABS, id="tabs")
        with ContentSwitcher(initial=self.tab, id="panes"):
            yield Overview(id="overview")
            yield LogView(id="logs")
            yield WorkersTable(id="workers")
            yield CheckpointsTable(id="checkpoints")
            yield EventsFeed(id="events")
            yield ConfigTable(id="config")

    def on_mount(self) -> None:
        self.action_tab(self.tab)

    def came_to_front(self) -> None:
        self.dtp.read_job(self.job_id)

    def selected(self) -> JobView | None:
        picture = self.dtp.cluster
        views = picture.jobs if picture else ()
        return next((view for view in views if view.job.id == self.job_id), None)

    def crumbs(self) -> Line:
        view = self.selected()
        wanted = self.wanted if self.tab == "logs" else ""
        line = crumb_line("Jobs", view.job.name if view else self.job_id, wanted=wanted)
        if view is None or wanted or self.tab == "overview":
            return line
        return Line(line.left, (label_span(labels.headline(view.job, view.gang)), Span(" ")))

    def show_jobs(self, picture: ClusterPicture) -> None:
        self.refresh_bindings()

    def show_job(self, picture: JobPicture) -> None:
        if picture.view.job.id == self.job_id:
            self._picture = picture
            self._show_tab()

    def show_lines(self, message: LinesArrived) -> None:
        if message.job_id != self.job_id:
            return
        pane = self.query_one(LogPane)
        if message.anew:
            buffer = LogBuffer()
            buffer.set_filter(pane.buffer.filter)
            pane.replace_buffer(buffer)
        pane.append(message.lines)

    def apply_filter(self, wanted: str) -> None:
        pane = self.query_one(LogPane)
        pane.set_filter(replace(pane.buffer.filter, pattern=wanted))

    def focus_body(self) -> None:
        pane = self.query_one(f"#{self.tab}")
        inner = pane.query_one(LogPane) if isinstance(pane, LogView) else pane
        self.set_focus(inner if inner.can_focus else None)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "filter" and self.tab != "logs":
            return False
        return super().check_action(action, parameters)

    def action_tab(self, tab: str) -> None:
        self.tab = tab
        self.query_one("#tabs", TabLine).show_tab(tab)
        self.query_one("#panes", ContentSwitcher).current = tab
        self.focus_body()
        self._show_tab()
        self.show_crumbs()
        self.refresh_bindings()

    def action_turn(self, by: int) -> None:
        self.action_tab(TABS[(TABS.index(self.tab) + by) % len(TABS)])

    def on_tab_line_chosen(self, event: TabLine.Chosen) -> None:
        self.action_tab(event.tab)

    def on_resize(self, _event: events.Resize) -> None:
        self._show_tab()

    def _show_tab(self) -> None:
        """Only what can be seen is brought up to date."""
        picture = self._picture
        if picture is None:
            return
        match self.tab:
            case "overview":
                self.query_one(Overview).show_job(picture)
            case "workers":
                self.query_one(WorkersTable).show_job(picture)
            case "checkpoints":
                table = self.query_one(CheckpointsTable)
                table.show_checkpoints(picture.checkpoints, picture.now)
            case "events":
                self.query_one(EventsFeed).show_events(picture.events)
            case "config":
                self.query_one(ConfigTable).show_job(picture.view.job)
            case _:
                pass  # lines come by themselves
