"""The keys of the screen that was left, the commands, and what the glyphs mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from dtp_tui.commandline import COMMANDS
from dtp_tui.labels import STATES, Tone
from dtp_tui.widgets.lines import Lines
from dtp_tui.widgets.spans import Line, Span

EVERYWHERE = (
    ("j k ↑ ↓ g G", "move"),
    ("esc q", "back, quit"),
    (":", "type a command"),
    ("?", "this help"),
    ("shift+mouse", "select text"),
)


class HelpScreen(ModalScreen[None]):
    CSS_PATH = "help.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter", "dismiss", "Back"),
        Binding("j,down", "scroll(1)", "Down", show=False),
        Binding("k,up", "scroll(-1)", "Up", show=False),
    ]

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._keys = tuple(keys)

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help"):
            with Horizontal():
                with Vertical():
                    yield _block("Keys here", self._keys)
                    yield _block("Keys everywhere", EVERYWHERE)
                with Vertical():
                    yield _block("Commands (… = a job's name)", commands())
                    yield _block("States", states())
            yield Static(
                "Lower case never changes anything. "
                "UPPER CASE changes a job, and always asks first.",
                id="rule",
            )

    def action_scroll(self, by: int) -> None:
        self.query_one("#help").scroll_relative(y=by, animate=False)


def commands() -> list[tuple[str, str]]:
    """Those that end in ``…`` take the name of a job, or mean the one that is selected."""
    return [(f":{c.name}{' …' if c.argument else ''}", c.help) for c in COMMANDS]


def states() -> list[tuple[str, str]]:
    return [(label.glyph, label.word) for label in STATES.values()]


def keys_of(
    bindings: Iterable[ActiveBinding], display: Callable[[Binding], str]
) -> list[tuple[str, str]]:
    """What each key of a screen does, as far as its tooltip says; those that change something
    last."""
    seen: dict[str, tuple[list[str], str]] = {}
    for active in bindings:
        binding = active.binding
        if binding.tooltip:
            seen.setdefault(binding.action, ([], binding.tooltip))[0].append(display(binding))
    rows = [(" ".join(dict.fromkeys(keys)), words) for keys, words in seen.values()]
    return sorted(rows, key=lambda row: len(row[0]) == 1 and row[0].isupper())


def _block(title: str, rows: Iterable[tuple[str, str]]) -> Lines:
    pairs = list(rows)
    width = max((len(keys) for keys, _ in pairs), default=0)
    lines = [Line((Span(title, strong=True),))]
    lines += [
        Line((Span(f"{keys:<{width}}  ", Tone.BUSY), Span(words, Tone.PLAIN)))
        for keys, words in pairs
    ]
    block = Lines(*lines, classes="block")
    block.styles.height = len(lines) + 1
    return block
