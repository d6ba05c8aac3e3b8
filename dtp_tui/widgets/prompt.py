"""The line above the keys: the last result, or what is being typed after ``:`` or ``/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.suggester import SuggestFromList
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Input

from dtp_tui.labels import Tone
from dtp_tui.widgets.lines import Lines
from dtp_tui.widgets.spans import Line, Span

Sign = Literal[":", "/"]
FLASH_S = 10.0


class PromptInput(Input):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel", show=False),
        Binding("tab", "cursor_right", "Complete", show=False),
    ]

    class Cancelled(Message):
        pass

    def action_cancel(self) -> None:
        self.post_message(self.Cancelled())


class Prompt(Horizontal):
    """Posts `Typed` at each change and `Entered` at enter; `Left` when the reader thinks better."""

    DEFAULT_CSS = """
    Prompt { height: 1; }
    Prompt > #sign { width: 2; display: none; }
    Prompt > PromptInput { width: 1fr; display: none; }
    Prompt.-typing > #flash { display: none; }
    Prompt.-typing > #sign, Prompt.-typing > PromptInput { display: block; }
    """

    @dataclass
    class Typed(Message):
        sign: Sign
        text: str

    @dataclass
    class Entered(Typed):
        pass

    @dataclass
    class Left(Message):
        sign: Sign

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(id=id)
        self.sign: Sign = ":"
        self._fading: Timer | None = None

    def compose(self) -> ComposeResult:
        yield Lines(id="flash")
        yield Lines(id="sign")
        yield PromptInput(compact=True, select_on_focus=False)

    def flash(self, text: str, tone: Tone) -> None:
        """Show a result for a while; an empty text clears it."""
        self.query_one("#flash", Lines).show([Line((Span(" "), Span(text, tone)))])
        if self._fading is not None:
            self._fading.stop()
        if text:
            self._fading = self.set_timer(FLASH_S, lambda: self.flash("", Tone.PLAIN))

    @property
    def is_open(self) -> bool:
        return self.has_class("-typing")

    def may_focus(self, widget: Widget | None) -> bool:
        """While it is open it keeps the keys, whatever else asks for them."""
        return not self.is_open or widget is self.query_one(PromptInput)

    def open(self, sign: Sign, text: str = "", suggestions: Sequence[str] = ()) -> None:
        """The very next key is typed into it."""
        self.sign = sign
        self.query_one("#sign", Lines).show([Line((Span(f" {sign}", Tone.BUSY, strong=True),))])
        typed = self.query_one(PromptInput)
        typed.suggester = SuggestFromList(suggestions, case_sensitive=False)
        self.add_class("-typing")
        with self.prevent(Input.Changed):
            typed.value = text
        typed.cursor_position = len(text)
        self.screen.set_focus(typed)  # `typed.focus()` would come after keys that wait

    def close(self) -> None:
        self.remove_class("-typing")

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if self.is_open:
            self.post_message(self.Typed(self.sign, event.value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.close()
        self.post_message(self.Entered(self.sign, event.value))

    def on_prompt_input_cancelled(self, event: PromptInput.Cancelled) -> None:
        event.stop()
        self.close()
        self.post_message(self.Left(self.sign))
