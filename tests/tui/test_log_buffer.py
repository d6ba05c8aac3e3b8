"""Lines in bounded memory, made harmless."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtp_trainer import wire
from dtp_tui.cleaning import LINE_CAP, harmless
from dtp_tui.widgets.log_buffer import (
    Level,
    LogBuffer,
    LogEntry,
    LogFilter,
    entry,
)


def lines(*texts: str, source: str = "rank0") -> list[LogEntry]:
    return [entry(wire.Text(1.0, source, "out", text)) for text in texts]


def shown(buffer: LogBuffer) -> list[str]:
    return [buffer.line(row).text for row in range(buffer.shown)]


def test_a_flood_leaves_the_newest_lines() -> None:
    """100,000 lines cost no more memory than the capacity, and the last one is there."""
    buffer = LogBuffer(capacity=1_000)
    for start in range(0, 100_000, 500):
        buffer.extend(lines(*(f"line {n}" for n in range(start, start + 500))))
    assert 1_000 <= len(buffer) <= 1_125
    assert buffer.total == 100_000
    assert shown(buffer)[-1] == "line 99999"
    assert buffer.number(buffer.shown - 1) == 99_999


def test_huge_lines_are_bounded_in_bytes() -> None:
    """Lines of a megabyte push the older ones out before memory is full."""
    buffer = LogBuffer(bytes_cap=100_000)
    for _ in range(50):
        buffer.extend(lines("x" * 1_000_000))
    assert len(buffer) <= 100_000 // LINE_CAP + 1
    assert shown(buffer)[-1].endswith("991,808 more characters")


@pytest.mark.parametrize(
    ("raw", "seen"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]52;c;c3RlYWw=\x1b\\text", "text"),
        ("10%\r50%\r100%", "100%"),
        ("a\tb", "a       b"),
        ("\x1b[2J\x1b[Hcleared", "cleared"),
        ("nul\x00bell\x07", "nul·bell·"),
        ("\u202egnp.exe", "·gnp.exe"),
        ("lone \ud800 surrogate", "lone · surrogate"),
        ("ends in escape \x1b", "ends in escape "),
        ("日本語 ünïcode 🚀", "日本語 ünïcode 🚀"),
    ],
)
def test_what_would_harm_a_terminal_is_taken_out(raw: str, seen: str) -> None:
    """No line can colour, clear, retitle, copy from or confuse the screen."""
    assert harmless(raw) == seen


@given(st.text(max_size=300))
def test_no_text_gets_through_as_a_control(text: str) -> None:
    """Whatever a script prints, what is shown has no control characters."""
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in harmless(text))


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("step 12 loss 0.3", Level.INFO),
        ("ERROR: cannot open", Level.ERROR),
        ("ValueError: bad shape", Level.ERROR),
        ("Traceback (most recent call last):", Level.ERROR),
        ("UserWarning: deprecated", Level.WARNING),
        ("WARN low disk", Level.WARNING),
        ("DEBUG x=1", Level.DEBUG),
        ("no errors found", Level.INFO),
    ],
)
def test_levels_are_read_from_the_usual_words(text: str, level: Level) -> None:
    """As Python, logging and most tools write them."""
    assert lines(text)[0].level is level


def test_a_filter_shows_what_matches_and_what_comes_later() -> None:
    """Old lines and new ones go through the same filter; ``!`` turns it round."""
    buffer = LogBuffer()
    buffer.extend(lines("loss 1", "lr 2", "LOSS 3"))
    buffer.set_filter(LogFilter("loss"))
    buffer.extend(lines("loss 4", "lr 5"))
    assert shown(buffer) == ["loss 1", "LOSS 3", "loss 4"]
    buffer.set_filter(LogFilter("!loss"))
    assert shown(buffer) == ["lr 2", "lr 5"]


def test_a_filter_that_is_no_expression_is_looked_for_as_it_stands() -> None:
    """Half a regular expression, while it is being typed, breaks nothing."""
    buffer = LogBuffer()
    buffer.extend(lines("f(x", "g"))
    buffer.set_filter(LogFilter("f(x"))
    assert shown(buffer) == ["f(x"]


def test_one_rank_or_errors_only() -> None:
    """Two further ways to see less."""
    buffer = LogBuffer()
    buffer.extend(
        [*lines("a", "ERROR b"), *lines("c", source="rank10"), *lines("d", source="rank2")]
    )
    buffer.set_filter(LogFilter(source="rank0", errors_only=True))
    assert shown(buffer) == ["ERROR b"]
    assert buffer.sources() == ("rank0", "rank2", "rank10")


def test_lines_keep_their_numbers_when_older_ones_go() -> None:
    """A reader who stands at a line finds it again."""
    buffer = LogBuffer(capacity=80)
    buffer.extend(lines(*(f"line {n}" for n in range(80))))
    gone = buffer.extend(lines(*(f"line {n}" for n in range(80, 100))))
    assert gone == 20
    row = buffer.row_of(50)
    assert buffer.line(row).text == "line 50"
    assert buffer.row_of(3) == 0
