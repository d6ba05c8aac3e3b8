"""A question with its consequences; Cancel is where enter goes unless the reader moves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Generic, TypeVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Button, Static

from dtp_tui.consequences import Consequence

Answer = TypeVar("Answer")


class Dialog(ModalScreen[Answer | None], Generic[Answer]):
    """Dismissed with an answer, or with None when the reader cancels."""

    CSS_PATH = ["confirm.tcss"]  # noqa: RUF012 - as textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n,q", "cancel", "Cancel"),
        Binding("y", "accept", "Yes"),
        Binding("left", "app.focus_previous", show=False),
        Binding("right", "app.focus_next", show=False),
    ]

    def __init__(self, consequence: Consequence) -> None:
        super().__init__()
        self._consequence = consequence

    def compose(self) -> ComposeResult:
        with Vertical(id="dialog"):
            yield Static(self._consequence.title, id="title", markup=False)
            yield from self.compose_choice()
            yield Static("\n".join(self._consequence.lines), id="what", markup=False)
            with Horizontal(id="buttons"):
                yield Button("Cancel", id="cancel", compact=True)
                yield Button(self._consequence.button, id="accept", compact=True)
                yield Static("y yes   esc cancel", id="hint")

    def on_mount(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Fill in what is to be chosen, and say where the keys go first."""
        self.query_one("#cancel", Button).focus()

    def compose_choice(self) -> Iterable[Widget]:
        """What is to be chosen beside yes or no."""
        return ()

    def answer(self) -> Answer | None:
        """What a yes means."""
        raise NotImplementedError

    def rewrite(self, consequence: Consequence) -> None:
        self.query_one("#title", Static).update(consequence.title)
        self.query_one("#what", Static).update("\n".join(consequence.lines))

    @on(Button.Pressed, "#cancel")
    def action_cancel(self) -> None:
        self.dismiss(None)

    @on(Button.Pressed, "#accept")
    def action_accept(self) -> None:
        self.dismiss(self.answer())


class ConfirmDialog(Dialog[bool]):
    def answer(self) -> bool:
        return True
