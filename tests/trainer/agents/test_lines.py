"""Cutting what ranks write into lines."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from dtp_trainer import wire
from dtp_trainer.worker.lines import LineCutter, Lines


def cut(*pieces: bytes, longest: int = 100) -> list[str]:
    cutter = LineCutter(longest)
    lines = [line for piece in pieces for line in cutter.feed(piece, 0.0)]
    return lines + cutter.end()


def test_lines_cross_reads() -> None:
    """A line that arrives in pieces is one line; one without an end comes at the end."""
    assert cut(b"he", b"llo\nwo", b"rld") == ["hello", "world"]


def test_empty_lines_stay() -> None:
    """Empty lines are lines."""
    assert cut(b"a\n\nb\n") == ["a", "", "b"]


def test_long_line_is_cut_with_a_note() -> None:
    """What exceeds the limit is dropped and counted."""
    assert cut(b"x" * 150, b"y" * 50 + b"\nz\n") == [
        "x" * 100 + " … [100 more bytes of this line were cut]",
        "z",
    ]


def test_windows_line_ends() -> None:
    """A carriage return before the newline is no text."""
    assert cut(b"a\r\nb\r\n") == ["a", "b"]


def test_progress_bars_say_their_newest_word_once_a_second() -> None:
    """What a carriage return overwrites is shown once a second, not each time."""
    cutter = LineCutter()
    shown = [
        line for tick in range(40) for line in cutter.feed(f"\r{tick}%".encode(), 10.0 + tick / 10)
    ]
    assert 3 <= len(shown) <= 5
    assert cutter.feed(b"\r100%\n", 20.0)[-1] == "100%"


@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_become_parsable_lines(data: bytes, size: int) -> None:
    """Whatever a rank writes, in whatever pieces: every line can be read back."""
    out = io.BytesIO()
    lines, cutter = Lines(out), LineCutter(60)
    for start in range(0, len(data), size):
        lines.text("rank0", "out", cutter.feed(data[start : start + size], 0.0))
    lines.text("rank0", "out", cutter.end())
    written = out.getvalue().decode().split("\n")
    assert written.pop() == ""
    assert all(isinstance(wire.parse(line), wire.Text) for line in written)


def test_broken_output_is_no_error() -> None:
    """A reader that is gone loses lines, not the worker."""
    out = io.BytesIO()
    out.close()
    Lines(out).say("worker0", "hello")
