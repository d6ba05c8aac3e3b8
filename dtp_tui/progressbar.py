"""An attached `dtp run` on a terminal: one live line below, everything else scrolls above it."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from dtp_engine.backend import LogLine
from dtp_engine.jobs import Event
from dtp_engine.views import JobView
from dtp_tui import labels, lines
from dtp_tui.attach import Happening
from dtp_tui.faces import event_line
from dtp_tui.output import Output
from dtp_tui.training import Progress as Training
from dtp_tui.training import job_window

WIDE = 100
"""Columns of a terminal that has room for a second reported value."""

STYLES = {
    labels.Tone.GOOD: "green",
    labels.Tone.BUSY: "cyan",
    labels.Tone.WARN: "yellow",
    labels.Tone.BAD: "red",
    labels.Tone.QUIET: "dim",
    labels.Tone.PLAIN: "",
}


class ProgressFace:
    """Lines are gathered between ticks, so that a flood of them costs ten redraws a second."""

    def __init__(self, out: Output) -> None:
        self.progress = Training()
        self._out = out
        self._waiting: list[str] = []
        self._console = Console(highlight=False, soft_wrap=True)
        self._most_values = 2 if self._console.width >= WIDE else 1
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[step]}"),
            TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True)),
            console=self._console,
            transient=True,
            refresh_per_second=8,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, step="", words="")
        self._bar.start()

    def show(self, happening: Happening) -> None:
        match happening:
            case JobView():
                self._view(happening)
            case Event():
                self._waiting.append(event_line(self._out, happening))
            case (_, line):
                self._line(line)

    def tick(self) -> None:
        if self._waiting:
            text = "\n".join(self._waiting)
            self._waiting.clear()
            self._bar.console.print(Text.from_ansi(text), soft_wrap=True)

    def close(self) -> None:
        self.tick()
        self._bar.stop()

    def _view(self, view: JobView) -> None:
        label = labels.headline(view.job, view.gang)
        style = STYLES[label.tone]
        described = f"[{style}]{label}[/]" if style else str(label)
        self._bar.update(self._task, description=described)

    def _line(self, line: LogLine) -> None:
        if line.text is not None:
            self._waiting.append(lines.text_line(self._out, line.text))
            return
        window = job_window(line)
        if window is None:
            return
        self.progress.add(window)
        self._bar.update(
            self._task,
            total=window.total_steps,
            completed=window.step,
            step=labels.step(window.step, window.total_steps),
            words="  ".join(self.progress.words(most_values=self._most_values)),
        )
