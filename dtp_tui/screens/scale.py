"""How many workers a job should have, within its range."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.reactive import reactive
from textual.widget import Widget

from dtp_engine.views import JobView
from dtp_tui import consequences
from dtp_tui.labels import Tone
from dtp_tui.screens.confirm import Dialog
from dtp_tui.widgets.lines import Lines
from dtp_tui.widgets.spans import Line, Span


class ScaleDialog(Dialog[int]):
    """Up and down, or a digit, choose; the words say what it would mean."""

    CSS_PATH = ["confirm.tcss", "scale.tcss"]  # noqa: RUF012 - as textual declares it

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,plus,k", "more(1)", "More"),
        Binding("down,minus,j", "more(-1)", "Fewer"),
        *(Binding(str(n), f"set({n})", str(n), show=False) for n in range(10)),
    ]

    wished: reactive[int] = reactive(0, init=False)

    def __init__(self, view: JobView) -> None:
        super().__init__(consequences.scale(view, view.job.workers))
        self._view = view
        self.set_reactive(ScaleDialog.wished, view.job.workers)

    def compose_choice(self) -> Iterable[Widget]:
        yield Lines(self._choice(), id="choice")

    def answer(self) -> int | None:
        """None for the number that it has already: there is nothing to ask for."""
        return None if self.wished == self._view.job.workers else self.wished

    def validate_wished(self, workers: int) -> int:
        nodes = self._view.job.spec.nodes
        return max(nodes.min, min(nodes.max, workers))

    def watch_wished(self) -> None:
        self.rewrite(consequences.scale(self._view, self.wished))
        self.query_one("#choice", Lines).show([self._choice()])

    def action_more(self, by: int) -> None:
        self.wished += by

    def action_set(self, workers: int) -> None:
        self.wished = workers

    def _choice(self) -> Line:
        nodes = self._view.job.spec.nodes
        return Line(
            (
                Span("workers  ", Tone.QUIET),
                Span("▼ ", Tone.BUSY if self.wished > nodes.min else Tone.QUIET),
                Span(f"{self.wished}", strong=True),
                Span(" ▲", Tone.BUSY if self.wished < nodes.max else Tone.QUIET),
                Span(f"   {nodes.min} to {nodes.max}, with ↑ ↓ or a digit", Tone.QUIET),
            )
        )
