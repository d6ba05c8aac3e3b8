"""The last line of every screen: the keys that work here, now."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from textual.binding import ActiveBinding
from textual.screen import Screen

from dtp_tui.labels import Tone
from dtp_tui.widgets.lines import Lines
from dtp_tui.widgets.spans import Line, Span

GAP = "  "
Key = tuple[str, str, bool]
"""What to press, what it does, whether it would do anything now."""


class KeyLine(Lines):
    """Follows the bindings of its screen."""

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self._bindings_changed)
        self._write()

    def on_resize(self) -> None:
        self._write()

    def _bindings_changed(self, screen: Screen[object]) -> None:
        if screen is self.screen:
            self._write()

    def _write(self) -> None:
        keys = shown_keys(self.screen.active_bindings.values(), self.app.get_key_display)
        self.show([key_line(keys, self.size.width)])


def shown_keys(bindings: Iterable[ActiveBinding], display: object) -> list[Key]:
    """One for each action that wants to be seen: plain keys, then verbs, then signs."""
    keys: dict[str, Key] = {}
    for active in bindings:
        if active.binding.show and active.binding.action not in keys:
            pressed = display(active.binding) if callable(display) else active.binding.key
            keys[active.binding.action] = (pressed, active.binding.description, active.enabled)
    return sorted(keys.values(), key=lambda key: (not key[0][0].isalpha(), key[0].isupper()))


def key_line(keys: Iterable[Key], width: int) -> Line:
    """As many as fit; help always does."""
    ordered = list(keys)
    last = [key for key in ordered if key[0] == "?"]
    spans: list[Span] = []
    room = width - 2 - sum(_width(key) for key in last)
    for key in ordered:
        if key in last:
            continue
        room -= _width(key)
        if room < 0:
            break
        spans.extend(_spans(key))
    return Line((Span(" "), *spans), tuple(span for key in last for span in _spans(key)))


def _width(key: Key) -> int:
    return cell_len(key[0]) + 1 + cell_len(key[1]) + len(GAP)


def _spans(key: Key) -> tuple[Span, Span]:
    pressed, description, enabled = key
    return (
        Span(pressed, Tone.BUSY if enabled else Tone.QUIET, strong=enabled),
        Span(f" {description}{GAP}", Tone.PLAIN if enabled else Tone.QUIET),
    )
