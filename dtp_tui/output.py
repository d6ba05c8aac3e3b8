"""All of stdout and stderr of the command line: tables, JSON lines, tones, exit codes.

With ``--json`` stdout holds one JSON object a line and nothing else; words for people go to stderr.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import IntEnum
from typing import Any, NoReturn, TextIO

from dtp_engine.errors import InfrastructureError
from dtp_engine.jobs import Job, JobState, Reason
from dtp_tui.labels import Label, Tone
from dtp_tui.tables import Column, Row, cell, lay_out

LONGEST_LINE = 4000
"""Characters of one line of a job's output shown to people; JSON and pipes get all of it."""


class Exit(IntEnum):
    """Exit codes of `dtp`; `docs/` and `dtp wait --help` tell the same."""

    SUCCEEDED = 0
    JOB_FAILED = 1
    USAGE = 2
    CANCELLED = 3
    NO_CAPACITY = 4
    LIMIT = 5
    """A budget or `max_duration` ended the job."""
    HANG = 6
    INFRASTRUCTURE = 7
    PAUSED = 8
    TIMEOUT = 124
    """`dtp wait --timeout` ran out; the job goes on."""
    DETACHED = 130
    BROKEN_PIPE = 141


_BY_REASON = {
    Reason.NO_CAPACITY: Exit.NO_CAPACITY,
    Reason.BUDGET: Exit.LIMIT,
    Reason.MAX_DURATION: Exit.LIMIT,
    Reason.HANG: Exit.HANG,
    Reason.START_TIMEOUT: Exit.HANG,
    Reason.INFRASTRUCTURE: Exit.INFRASTRUCTURE,
    Reason.WORKER_LOST: Exit.INFRASTRUCTURE,
    Reason.SPOT_INTERRUPTION: Exit.INFRASTRUCTURE,
}


def exit_code_of(job: Job) -> Exit:
    """What `run` and `wait` exit with once the job has come to rest; 0 while it is active."""
    match job.state:
        case JobState.SUCCEEDED:
            return Exit.SUCCEEDED
        case JobState.FAILED:
            return _BY_REASON.get(job.reason, Exit.JOB_FAILED) if job.reason else Exit.JOB_FAILED
        case JobState.CANCELLED:
            return Exit.LIMIT if _at_limit(job) else Exit.CANCELLED
        case JobState.PAUSED:
            return Exit.LIMIT if _at_limit(job) else Exit.PAUSED
        case _:
            return Exit.SUCCEEDED


def _at_limit(job: Job) -> bool:
    return job.reason in (Reason.BUDGET, Reason.MAX_DURATION)


_COLOURS = {
    Tone.GOOD: "32",
    Tone.BUSY: "36",
    Tone.WARN: "33",
    Tone.BAD: "31",
    Tone.QUIET: "2",
}
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b[@-Z\\-_]")


class Output:
    """Where one command writes. `live` flushes each line, for commands that follow."""

    def __init__(self, *, json_lines: bool = False, live: bool = False) -> None:
        self.json_lines = json_lines
        self._people: TextIO = sys.stderr if json_lines else sys.stdout
        self.terminal = is_terminal(self._people)
        self.colour = self.terminal and wants_colour()
        if live:
            _buffer_by_line(sys.stdout)

    def emit(self, record: Mapping[str, Any]) -> None:
        """One JSON line."""
        _write(sys.stdout, json_line(record))

    def say(self, text: str = "") -> None:
        """A line for people."""
        _write(self._people, text)

    def hint(self, text: str) -> None:
        """A quiet line for people, about what to type next."""
        note(self.paint(text, Tone.QUIET) if is_terminal(sys.stderr) and self.colour else text)

    def paint(self, text: str, tone: Tone) -> str:
        code = _COLOURS.get(tone)
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text else text

    def label(self, label: Label) -> str:
        return self.paint(str(label), label.tone)

    def table(self, columns: Sequence[Column], rows: Sequence[Row]) -> None:
        """Aligned columns; on a terminal as wide as it is, in a pipe as wide as they are."""
        cells = [[cell(item) for item in row] for row in rows]
        width = terminal_width() if self.terminal else None
        for line in lay_out(columns, cells, width, self.paint):
            self.say(line)


def note(text: str) -> None:
    """A line on stderr."""
    _write(sys.stderr, text)


def fail(text: str, code: int) -> NoReturn:
    """One line on stderr, and out."""
    with suppress(ReaderGone, InfrastructureError):
        flush()
    note(f"dtp: {text}")
    sys.exit(code)


def _write(stream: TextIO, text: str) -> None:
    if stream is sys.stderr:
        with suppress(OSError):  # a terminal that is gone has nobody to tell it to
            stream.write(text + "\n")
            stream.flush()
        return
    with _writing():
        stream.write(text + "\n")


def flush() -> None:
    """Raises `ReaderGone`, `InfrastructureError` (a full disk)."""
    with _writing():
        sys.stdout.flush()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        _drop_stdout()
        raise ReaderGone from error
    except OSError as error:
        _drop_stdout()
        raise InfrastructureError(f"the output cannot be written: {error.strerror}") from error


class ReaderGone(Exception):
    """Nobody reads the output any more (``dtp ps | head -1``)."""


def leave_quietly() -> NoReturn:
    """After `ReaderGone`."""
    sys.exit(Exit.BROKEN_PIPE)


def _drop_stdout() -> None:
    """What is still in its buffer must not be tried again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def prepare_streams() -> None:
    """A character that the terminal cannot show becomes a question mark, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _buffer_by_line(stream: TextIO) -> None:
    with suppress(AttributeError, ValueError):
        stream.reconfigure(line_buffering=True)  # type: ignore[attr-defined]


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def wants_colour() -> bool:
    """Not with NO_COLOR set to anything (no-color.org)."""
    return not os.environ.get("NO_COLOR")


def terminal_width() -> int:
    return max(shutil.get_terminal_size((80, 24)).columns, 20)


def json_line(record: Mapping[str, Any]) -> str:
    """Strict JSON: times as ISO 8601 in UTC; NaN and infinities, which JSON lacks, as text."""
    return json.dumps(_plain(record), ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def shown_line(text: str) -> str:
    """A line of a job's output, safe for a terminal: colours stay, what moves the cursor goes."""
    if len(text) > LONGEST_LINE:
        text = f"{text[:LONGEST_LINE]}… ({len(text):,} characters)"
    if text.isprintable():
        return text
    text = text.rstrip("\r").rpartition("\r")[2]  # progress bars: what a terminal would end with
    text = _ESCAPES.sub("", text.expandtabs())
    kept = "".join(c if c.isprintable() or c == "\x1b" else "�" for c in text)
    return f"{kept}\x1b[0m" if "\x1b" in kept else kept
