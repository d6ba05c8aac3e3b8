"""A worker's stdout: text lines of its ranks, cut and decoded, between the records of its agent."""

from __future__ import annotations

import asyncio
import codecs
import sys
import time
from collections import deque
from typing import BinaryIO, Literal

from dtp_trainer.wire import Record, Text, encode, encode_text

LONGEST_BYTES = 64 * 1024
PROGRESS_EVERY_S = 1.0
TAIL_LINES = 400


class LineCutter:
    """Bytes in, whole lines out; a line is never longer than `longest` bytes.

    What a carriage return overwrites is dropped, but for one line a second: progress bars would
    otherwise say nothing for hours, or the same thing thousands of times.
    """

    def __init__(self, longest: int = LONGEST_BYTES) -> None:
        self._longest = longest
        self._rest = bytearray()
        self._dropped = 0
        self._shown_at = 0.0

    def feed(self, data: bytes, now: float) -> list[str]:
        """`now`: seconds of any steady clock."""
        *whole, rest = data.split(b"\n")
        lines = []
        for piece in whole:
            self._add(piece)
            lines.append(self._take())
        self._add(rest)
        return lines + self._progress(now)

    def end(self) -> list[str]:
        """What came without a newline."""
        return [self._take()] if self._rest or self._dropped else []

    def _add(self, piece: bytes) -> None:
        room = self._longest - len(self._rest)
        self._rest += piece[:room]
        self._dropped += max(0, len(piece) - room)

    def _take(self) -> str:
        text = _decode(bytes(self._rest).rstrip(b"\r").rpartition(b"\r")[2])
        if self._dropped:
            text += f" … [{self._dropped} more bytes of this line were cut]"
        self._rest.clear()
        self._dropped = 0
        return text

    def _progress(self, now: float) -> list[str]:
        """The newest text that a carriage return ended."""
        before, found, after = bytes(self._rest).rpartition(b"\r")
        if not found or now - self._shown_at < PROGRESS_EVERY_S:
            return []
        shown = before.rpartition(b"\r")[2]
        self._rest[:] = after
        self._shown_at = now
        return [_decode(shown)] if shown.strip() else []


def _decode(data: bytes) -> str:
    return codecs.decode(data, "utf-8", "replace")


class Lines:
    """All that a worker prints. A full disk, or a reader that is gone, loses lines and no work."""

    def __init__(self, out: BinaryIO | None = None) -> None:
        self._out = out or sys.stdout.buffer

    def record(self, record: Record) -> None:
        self._write([encode(record)])

    def say(self, source: str, text: str, stream: Literal["out", "err"] = "err") -> None:
        """One line of the agent itself."""
        self.text(source, stream, [text])

    def text(self, source: str, stream: Literal["out", "err"], lines: list[str]) -> None:
        now = time.time()
        self._write([encode_text(Text(now, source, stream, line)) for line in lines])

    def _write(self, lines: list[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        try:
            self._out.write(data)
            self._out.flush()
        except (OSError, ValueError):
            return


async def pump(
    reader: asyncio.StreamReader,
    lines: Lines,
    source: str,
    stream: Literal["out", "err"],
    tail: deque[str] | None = None,
) -> None:
    """Print what comes until the end of the stream; `tail` keeps the newest lines.

    Reads are bounded and the loop gets its turn between them, so a rank that floods its output
    waits for itself alone.
    """
    cutter = LineCutter()
    while data := await reader.read(LONGEST_BYTES):
        _print(cutter.feed(data, time.monotonic()), lines, source, stream, tail)
        await asyncio.sleep(0)
    _print(cutter.end(), lines, source, stream, tail)


def _print(
    found: list[str],
    lines: Lines,
    source: str,
    stream: Literal["out", "err"],
    tail: deque[str] | None,
) -> None:
    if not found:
        return
    lines.text(source, stream, found)
    if tail is not None:
        tail.extend(found[-TAIL_LINES:])
