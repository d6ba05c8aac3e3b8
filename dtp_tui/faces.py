"""How an attached `dtp run` shows its job: JSON lines for a program, plain lines for a pipe."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from dtp_engine.backend import LogLine
from dtp_engine.jobs import Event
from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_tui import labels, records
from dtp_tui.attach import Happening
from dtp_tui.cleaning import harmless
from dtp_tui.lines import text_line
from dtp_tui.output import Output
from dtp_tui.training import Progress, job_window

PLAIN_EVERY_S = 5.0
"""Between two lines of progress where there is no terminal."""


class JsonFace:
    """One object a line; its ``event`` says what it is."""

    def __init__(self, out: Output) -> None:
        self.progress = Progress()
        self._out = out
        self._state: dict[str, Any] = {}
        self._saved: str | None = None

    def show(self, happening: Happening) -> None:
        match happening:
            case JobView():
                self._view(happening)
            case Event():
                self._emit("timeline", **records.event_record(happening))
            case (attempt, line):
                self._line(attempt, line)

    def tick(self) -> None:
        return

    def close(self) -> None:
        return

    def _view(self, view: JobView) -> None:
        record = records.job_record(view)
        state = {name: record[name] for name in ("state", "intent", "reason", "detail", "workers")}
        state["attempt"] = record["attempt"]
        if state != self._state:
            self._state = state
            self._emit("state", at=datetime.now(UTC), doing=record["doing"], **state)
        if view.checkpoint is not None and view.checkpoint.name != self._saved:
            self._saved = view.checkpoint.name
            self._emit("checkpoint", **records.checkpoint_record(view.checkpoint))

    def _line(self, attempt: int, line: LogLine) -> None:
        window = job_window(line)
        if window is not None:
            self.progress.add(window)
            self._emit("metrics", **records.window_record(attempt, window))
        elif line.text is not None:
            self._emit("log", **records.text_record(attempt, line.worker, line.text))

    def _emit(self, event: str, **record: object) -> None:
        self._out.emit({"event": event, **record})


class PlainFace:
    """Lines for a pipe or a log file: what ranks write, what happens, now and then the progress."""

    def __init__(self, out: Output) -> None:
        self.progress = Progress()
        self._out = out
        self._told: tuple[int, int] | None = None
        self._told_at = time.monotonic()

    def show(self, happening: Happening) -> None:
        match happening:
            case JobView():
                return
            case Event():
                self._out.say(event_line(self._out, happening))
            case (_, line) if line.text is not None:
                self._out.say(text_line(self._out, line.text))
            case (_, line):
                self._window(job_window(line))

    def tick(self) -> None:
        return

    def close(self) -> None:
        """The last window is always told."""
        self._tell()

    def _window(self, window: wire.Window | None) -> None:
        if window is None:
            return
        self.progress.add(window)
        if time.monotonic() - self._told_at >= PLAIN_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        window = self.progress.window
        if window is None or self._told == (window.generation, window.step):
            return
        self._told = (window.generation, window.step)
        self._told_at = time.monotonic()
        step = f"step {labels.step(window.step, window.total_steps)}"
        told = "  ".join([step, *self.progress.words()])
        self._out.say(f"{labels.clock(window.at)} {told}")


def event_line(out: Output, event: Event) -> str:
    """A happening between the lines of the ranks."""
    return out.paint(f"{labels.clock(event.at)} · {harmless(event.text)}", labels.Tone.QUIET)
