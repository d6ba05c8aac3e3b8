"""One line of a rank's output as a terminal shows it."""

from __future__ import annotations

from dtp_trainer.wire import Text
from dtp_tui.labels import Tone, clock
from dtp_tui.output import Output, shown_line

RANK_COLOURS = ("36", "35", "34", "33", "32", "96", "95", "94")


def text_line(out: Output, text: Text) -> str:
    """``14:03:07 rank0 │ words``; stderr has a bar of another tone. A pipe gets every character."""
    bar = out.paint("│", Tone.BAD if text.stream == "err" else Tone.QUIET)
    shown = shown_line(text.text) if out.terminal else text.text
    return f"{out.paint(clock(text.at), Tone.QUIET)} {source(out, text.source)} {bar} {shown}"


def source(out: Output, name: str) -> str:
    """Each rank in its own colour."""
    if not out.colour or not name.startswith("rank"):
        return out.paint(f"{name:<5}", Tone.QUIET)
    number = name.removeprefix("rank")
    colour = RANK_COLOURS[int(number) % len(RANK_COLOURS)] if number.isdigit() else "0"
    return f"\x1b[{colour}m{name:<5}\x1b[0m"
