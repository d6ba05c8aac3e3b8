"""What all full screens share: header, crumbs, prompt, keys, and the verbs that change a job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import Screen
from textual.widget import Widget

from dtp_engine.views import JobView
from dtp_tui import consequences
from dtp_tui.commandline import suggestions
from dtp_tui.labels import Tone
from dtp_tui.messages import ClusterPicture, JobPicture, LinesArrived, Verb, VerbChosen
from dtp_tui.widgets.key_line import KeyLine
from dtp_tui.widgets.lines import Lines
from dtp_tui.widgets.prompt import Prompt
from dtp_tui.widgets.spans import Line, Span, joined
from dtp_tui.widgets.status_bar import status_line

if TYPE_CHECKING:
    from dtp_tui.dashboard import DtpApp


_VERBS = {"P": Verb.PAUSE, "R": Verb.RESUME, "S": Verb.SCALE, "X": Verb.STOP}
ROOMY = 110
"""Columns from which the header writes words beside its glyphs."""


class Frame(Screen[None]):
    """Subclasses fill `compose_body`, and answer what is selected and where we are."""

    CSS_PATH = ["frame.tcss"]  # noqa: RUF012 - as textual declares it
    AUTO_FOCUS = ""
    VERTICAL_BREAKPOINTS = [(0, "-short"), (38, "-tall")]  # noqa: RUF012 - as textual declares it
    # Signs have priority: they act before the keys behind them are given to any widget.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("P", "ask('pause')", "Pause", tooltip="checkpoint, free machines"),
        Binding("R", "ask('resume')", "Resume", tooltip="go on from a checkpoint"),
        Binding("S", "ask('scale')", "Scale", tooltip="more or fewer workers"),
        Binding("X", "ask('stop')", "Stop", tooltip="checkpoint, and end the job"),
        Binding(
            "slash",
            "filter",
            "Filter",
            key_display="/",
            tooltip="what matches; ! = what does not",
            priority=True,
        ),
        Binding("slash", "filter", show=False),  # after a key that brings what can be filtered
        Binding("colon", "command", "Command", key_display=":", priority=True),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("r", "refresh_now", "Refresh", tooltip="look again now", show=False),
        Binding("escape", "back", "Back", show=False),
    ]

    wanted: str = ""
    """The filter."""
    _was_mounted: bool = False

    def compose(self) -> ComposeResult:
        yield Lines(id="status")
        yield Lines(id="crumbs")
        with Vertical(id="body"):
            yield from self.compose_body()
        yield Prompt(id="prompt")
        yield KeyLine(id="keys")

    # ------------------------------------------------------------------ what subclasses say

    def compose_body(self) -> Iterable[Widget]:
        raise NotImplementedError

    def selected(self) -> JobView | None:
        """The job that verbs and commands without a name mean."""
        return None

    def crumbs(self) -> Line:
        return Line()

    def show_jobs(self, picture: ClusterPicture) -> None:
        """A new picture came."""

    def show_job(self, picture: JobPicture) -> None:
        """A new picture of the job that this screen asked for came."""

    def show_lines(self, message: LinesArrived) -> None:
        """Lines of the job that this screen asked for came."""

    def apply_filter(self, wanted: str) -> None:
        """Show only what matches; called at each key."""

    def back(self) -> None:
        self.dismiss()

    def came_to_front(self) -> None:
        """The screen is seen, for the first time or again: ask for what it shows."""

    # -------------------------------------------------------------------------- what comes in

    @property
    def dtp(self) -> DtpApp:
        return self.app  # type: ignore[return-value]

    @property
    def is_ready(self) -> bool:
        """Whether its widgets are there: not before it is mounted, nor once it is being closed."""
        return self._was_mounted and len(self.children) > 0

    def on_mount(self) -> None:
        self._was_mounted = True
        self._come_to_front()

    def on_screen_resume(self) -> None:
        if self.is_ready:
            self._come_to_front()

    def _come_to_front(self) -> None:
        self.show_cluster(self.dtp.cluster)
        self.came_to_front()

    def show_cluster(self, picture: ClusterPicture | None) -> None:
        """Called by the app twice a second, and once when the screen comes to the front."""
        self.query_one("#status", Lines).show(
            [status_line(picture, self.dtp.backend, is_narrow=self.size.width < ROOMY)]
        )
        if picture is not None:
            self.show_jobs(picture)
            if picture.problem:
                self.flash(picture.problem, Tone.BAD)
        self.show_crumbs()

    def show_crumbs(self) -> None:
        self.query_one("#crumbs", Lines).show([self.crumbs()])

    def flash(self, text: str, tone: Tone = Tone.PLAIN) -> None:
        self.query_one(Prompt).flash(text, tone)

    # ------------------------------------------------------------------------------------ keys

    def set_focus(
        self,
        widget: Widget | None,
        scroll_visible: bool = True,  # noqa: FBT001, FBT002 - as textual declares it
        from_app_focus: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        if not self.is_ready or self.query_one(Prompt).may_focus(widget):
            super().set_focus(widget, scroll_visible, from_app_focus)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("command", "filter"):
            return self.is_ready and not self.query_one(Prompt).is_open
        if action != "ask":
            return True
        view = self.selected()
        possible = view and consequences.refusal(Verb(str(parameters[0])), view.job) is None
        return True if possible else None

    def on_key(self, event: events.Key) -> None:
        """A verb that cannot be says why."""
        verb, view = _VERBS.get(event.key), self.selected()
        reason = consequences.refusal(verb, view.job) if verb and view else None
        if reason is not None:
            self.flash(reason, Tone.WARN)

    def action_ask(self, verb: str) -> None:
        view = self.selected()
        if view is not None:
            self.post_message(VerbChosen(Verb(verb), view))

    def action_command(self) -> None:
        names = [view.job.name for view in self.dtp.cluster.jobs] if self.dtp.cluster else []
        self.query_one(Prompt).open(":", suggestions=suggestions(names))

    def action_filter(self) -> None:
        self.query_one(Prompt).open("/", self.wanted)

    def action_help(self) -> None:
        self.dtp.show_help()

    def action_refresh_now(self) -> None:
        self.dtp.look_now()

    def action_back(self) -> None:
        if self.wanted:
            self._filter_by("")
        else:
            self.back()

    # ---------------------------------------------------------------------------------- prompt

    def on_prompt_typed(self, event: Prompt.Typed) -> None:
        if event.sign == "/":
            self._filter_by(event.text)

    def on_prompt_entered(self, event: Prompt.Entered) -> None:
        self.focus_body()
        if event.sign == "/":
            self._filter_by(event.text)
        elif event.text.strip():
            self.dtp.obey(event.text)

    def on_prompt_left(self, event: Prompt.Left) -> None:
        self.focus_body()
        if event.sign == "/":
            self._filter_by("")

    def focus_body(self) -> None:
        """Give the keys back to what this screen is about."""
        self.set_focus(None)

    def _filter_by(self, wanted: str) -> None:
        self.wanted = wanted
        self.apply_filter(wanted)
        self.show_crumbs()


def crumb_line(*names: str, wanted: str = "", found: str = "") -> Line:
    """``Jobs / digits`` and, at the right, the filter."""
    groups = [(Span(name, strong=name == names[-1]),) for name in names]
    right = (Span(f"/{wanted}  ", Tone.BUSY), Span(f"{found} ", Tone.QUIET)) if wanted else ()
    return Line((Span(" "), *joined(groups, " / ")), right)
