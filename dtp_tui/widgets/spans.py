"""Text in tones: what a line says and what each part of it means; colours are the style sheet's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from dtp_tui.labels import Label, Tone


@dataclass(frozen=True, slots=True)
class Span:
    text: str
    tone: Tone = Tone.PLAIN
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Parts from the left, and parts that stand at the right edge while there is room for them."""

    left: tuple[Span, ...] = ()
    right: tuple[Span, ...] = ()

    def __str__(self) -> str:
        return "  ".join(filter(None, ("".join(s.text for s in side) for side in self._sides)))

    @property
    def _sides(self) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        return self.left, self.right


def label_span(label: Label) -> Span:
    return Span(str(label), label.tone)


def joined(groups: Iterable[Sequence[Span]], gap: str = "   ") -> tuple[Span, ...]:
    """Groups of spans with a gap between them; empty groups leave none."""
    spans: list[Span] = []
    for group in groups:
        if not group:
            continue
        if spans:
            spans.append(Span(gap))
        spans.extend(group)
    return tuple(spans)


def fit(text: str, width: int) -> str:
    """Exactly `width` cells: cut with an ellipsis, or padded.

    >>> fit("generation", 6), fit("ok", 4)
    ('gener…', 'ok  ')
    """
    if width <= 0:
        return ""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…"


TONES = {f"tone--{tone}" for tone in Tone}
"""To be named by a `Toned` class of two bases: textual inherits them along the first only."""


class Toned(Widget):
    """A widget that paints spans; `.tone--…` in the style sheet gives each tone its colour."""

    COMPONENT_CLASSES: ClassVar[set[str]] = TONES

    def ink(self, tone: Tone, *, strong: bool = False) -> Style:
        return self.colour(f"tone--{tone}") + Style(bold=True if strong else None)

    def colour(self, component: str) -> Style:
        """What a component class says of the letters; the ground stays the widget's own."""
        style = self.get_component_rich_style(component)
        return Style(color=style.color, bold=style.bold, italic=style.italic)

    def grounded(self, strip: Strip) -> Strip:
        """The strip on the widget's background, where it has none of its own."""
        return strip.apply_style(self.rich_style)

    def paint(self, line: Line, width: int) -> Strip:
        """The line in exactly `width` cells."""
        return self.grounded(
            paint(line, width, lambda span: self.ink(span.tone, strong=span.strong))
        )


def paint(line: Line, width: int, ink: Callable[[Span], Style]) -> Strip:
    right_width = sum(cell_len(span.text) for span in line.right)
    if right_width + 1 > width // 2 and right_width + 1 + _length(line.left) > width:
        line, right_width = Line(line.left), 0
    room = width - right_width - (1 if right_width else 0)
    segments: list[Segment] = []
    for span in line.left:
        if room <= 0:
            break
        text = span.text if cell_len(span.text) <= room else fit(span.text, room)
        segments.append(Segment(text, ink(span)))
        room -= cell_len(text)
    if right_width:
        segments.append(Segment(" " * (room + 1)))
        segments.extend(Segment(span.text, ink(span)) for span in line.right)
    elif room > 0:
        segments.append(Segment(" " * room))
    return Strip(segments, width)


def _length(spans: Iterable[Span]) -> int:
    return sum(cell_len(span.text) for span in spans)
