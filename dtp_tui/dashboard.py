"""DtpApp: opens the engine, turns what it says into messages, holds the screens; nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App
from textual.binding import Binding, BindingType
from textual.theme import Theme
from textual.worker import WorkerFailed

from dtp_engine.engine import Engine
from dtp_engine.errors import DtpError
from dtp_tui import asking, consequences, crash
from dtp_tui.commandline import BadCommand, Order, parse, verb_of
from dtp_tui.feed import TICK_S, Feed, wall_clock
from dtp_tui.labels import Tone
from dtp_tui.lifeline import Lifeline
from dtp_tui.messages import (
    ClusterPicture,
    ClusterPolled,
    JobPolled,
    LinesArrived,
    Verb,
    VerbChosen,
)
from dtp_tui.screens.frame import Frame
from dtp_tui.screens.help import HelpScreen, keys_of
from dtp_tui.screens.job import JobScreen
from dtp_tui.screens.jobs import JobsScreen

THEME = Theme(
    name="dtp",
    primary="#6cb6ff",
    secondary="#96d0ff",
    accent="#dcbdfb",
    success="#6bc46d",
    warning="#daaa3f",
    error="#f47067",
    foreground="#cdd9e5",
    background="#0f141a",
    surface="#161c24",
    panel="#222b36",
    dark=True,
)
SIGNALLED = 128
CLOSE_S = 2.0
"""An engine that does not answer is not waited for: the terminal is given back."""
LEAVE_S = 5.0
"""From a signal until the process ends, whatever it is doing."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the dashboard looks: what is shown of it, and how it is opened."""

    backend: str
    open: Callable[[], Awaitable[Engine]]
    now: Callable[[], datetime] = wall_clock
    tick_s: float = TICK_S
    """How often the engine is asked."""


class DtpApp(App[None]):
    CSS_PATH = "app.tcss"
    TITLE = "dtp"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c,ctrl+q", "leave", "Quit", show=False, system=True),
    ]

    def __init__(
        self, source: Source, *, job: str | None = None, lifeline: Lifeline | None = None
    ) -> None:
        super().__init__()
        self._lifeline = lifeline
        self._handlers: dict[signal.Signals, Any] = {}
        self.backend = source.backend
        self.cluster: ClusterPicture | None = None
        self._source = source
        self._job = job
        self._home = JobsScreen()
        self._engine: Engine | None = None
        self._feed: Feed | None = None
        self._feeding: asyncio.Task[None] | None = None
        self.animation_level = "none"
        self.register_theme(THEME)
        self.theme = THEME.name

    async def on_mount(self) -> None:
        self._catch_signals()
        await self.push_screen(self._home)
        self.run_worker(self._connect(), exit_on_error=True)

    async def on_unmount(self) -> None:
        self._restore_signals()
        if self._feeding is not None:
            self._feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._feeding
        if self._engine is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._engine.aclose()

    # -------------------------------------------------------------------- what the engine says

    def on_cluster_polled(self, message: ClusterPolled) -> None:
        self.cluster = message.picture
        if self._is_shown:
            with self.batch_update():
                self.front.show_cluster(message.picture)

    def on_job_polled(self, message: JobPolled) -> None:
        if self._is_shown:
            with self.batch_update():
                self.front.show_job(message.picture)

    def on_lines_arrived(self, message: LinesArrived) -> None:
        if self._is_shown:
            self.front.show_lines(message)

    @property
    def _is_shown(self) -> bool:
        """Screens are taken down while messages still come."""
        return self.is_running and self.front.is_ready

    @property
    def front(self) -> Frame:
        """The full screen that is seen, be it below a dialog."""
        frames = (screen for screen in reversed(self.screen_stack) if isinstance(screen, Frame))
        return next(frames, self._home)

    # ------------------------------------------------------------------- what the screens want

    def open_job(self, job_id: str, tab: str = "overview") -> None:
        if isinstance(self.front, JobScreen):
            self.pop_screen()
        self.push_screen(JobScreen(job_id, tab))

    def read_job(self, job_id: str | None) -> None:
        """Read this job's details, lines and metrics from now on, and no other's."""
        if self._feed is not None:
            self._feed.open(job_id)

    def look_now(self) -> None:
        if self._feed is not None:
            self._feed.hurry()

    def show_help(self) -> None:
        bindings = self.screen.active_bindings.values()
        self.push_screen(HelpScreen(keys_of(bindings, self.get_key_display)))

    def obey(self, text: str) -> None:
        """A typed command."""
        try:
            order = parse(text)
        except BadCommand as error:
            self.front.flash(str(error), Tone.WARN)
            return
        match order.command:
            case "quit":
                self.action_leave()
            case "help":
                self.show_help()
            case "jobs":
                if isinstance(self.front, JobScreen):
                    self.pop_screen()
            case _:
                self.run_worker(self._obey_about_job(order), exit_on_error=True)

    def on_verb_chosen(self, message: VerbChosen) -> None:
        reason = consequences.refusal(message.verb, message.view.job)
        if reason is not None:
            self.front.flash(reason, Tone.WARN)
        elif self._engine is not None:
            self.run_worker(self._ask_and_do(self._engine, message), exit_on_error=True)

    def action_leave(self) -> None:
        """Leave the terminal as it was; jobs go on."""
        active = sum(view.job.active for view in self.cluster.jobs) if self.cluster else 0
        goes = "job goes" if active == 1 else "jobs go"
        self.exit(message=f"{active} {goes} on; come back with: dtp-tui" if active else None)

    # ---------------------------------------------------------------------------------- inside

    async def _connect(self) -> None:
        try:
            self._engine = await self._source.open()
        except DtpError as error:
            self.exit(return_code=error.exit_code, message=Text(f"dtp-tui: {error}"))
            return
        source = self._source
        self._feed = Feed(self._engine, self.post_message, now=source.now, tick_s=source.tick_s)
        self._feeding = asyncio.create_task(self._feed.run(), name="feed")
        if self._job is not None:
            await self._open_by_name(self._engine, self._job, "overview")

    async def _open_by_name(self, engine: Engine, ref: str, tab: str) -> None:
        try:
            job = await engine.find(ref)
        except DtpError as error:
            self.front.flash(str(error), Tone.BAD)
            return
        self.open_job(job.id, tab)

    async def _obey_about_job(self, order: Order) -> None:
        if self._engine is None:
            return
        selected = self.front.selected()
        if not order.job and selected is None:
            self.front.flash(f"which job? :{order.command} NAME", Tone.WARN)
            return
        ref = order.job or (selected.job.id if selected else "")
        verb = verb_of(order)
        if verb is None:
            tab = "overview" if order.command == "job" else order.command
            await self._open_by_name(self._engine, ref, tab)
            return
        try:
            view = await self._engine.job((await self._engine.find(ref)).id)
        except DtpError as error:
            self.front.flash(str(error), Tone.BAD)
            return
        self.post_message(VerbChosen(verb, view))

    async def _ask_and_do(self, engine: Engine, message: VerbChosen) -> None:
        verb, view = message.verb, message.view
        try:
            wish = await asking.ask(self, engine, verb, view, self._source.now())
        except DtpError as error:
            self.front.flash(str(error), Tone.BAD)
            return
        if wish is None:
            return
        self.front.flash(f"{wish.job_name}: {_UNDER_WAY[verb]}…", Tone.BUSY)
        text, tone = await asking.perform(engine, wish)
        self.front.flash(text, tone)
        self.look_now()

    def _fatal_error(self) -> None:
        """One line where textual would print pages; they are kept in a file."""
        error = self._exception or RuntimeError("unknown")
        cause = error.error if isinstance(error, WorkerFailed) else error
        self._exit_renderables.append(Text(f"dtp-tui: {crash.report(cause, ['dtp-tui'])}"))
        self._close_messages_no_wait()

    def _catch_signals(self) -> None:
        """Handlers of the process, not of the loop: the loop may be waiting for the terminal."""
        loop = asyncio.get_running_loop()

        def leave(number: int, _frame: object) -> None:
            if self._lifeline is not None:
                self._lifeline.leave_within(LEAVE_S, SIGNALLED + number)
            loop.call_soon_threadsafe(self.exit, None, SIGNALLED + number)

        self._handlers = {n: signal.signal(n, leave) for n in (signal.SIGTERM, signal.SIGHUP)}

    def _restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


_UNDER_WAY = {
    Verb.PAUSE: "asking its workers to checkpoint and leave",
    Verb.RESUME: "resuming",
    Verb.SCALE: "scaling",
    Verb.STOP: "stopping",
}
