"""Tables, JSON lines and exit codes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from dtp_engine.jobs import Attempt, Event, Intent, Job, JobSpec, JobState, Reason
from dtp_engine.views import JobView
from dtp_tui.commands.events import print_event
from dtp_tui.commands.pause import how_to_go_on
from dtp_tui.commands.show import _print_attempts
from dtp_tui.faces import PlainFace
from dtp_tui.output import (
    LONGEST_LINE,
    Exit,
    Output,
    exit_code_of,
    json_line,
    shown_line,
)
from dtp_tui.running import summary
from dtp_tui.tables import Cell, Column, lay_out, shorten


def ended(state: JobState, reason: Reason | None = None) -> Job:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    spec = JobSpec(name="a", run="python a.py")
    return Job("a1", "a", spec, state, Intent.RUN, 1, now, "ana", reason=reason)


@pytest.mark.parametrize(
    ("state", "reason", "code"),
    [
        (JobState.SUCCEEDED, None, 0),
        (JobState.SUCCEEDED, Reason.NO_STEPS, 0),
        (JobState.FAILED, None, 1),
        (JobState.FAILED, Reason.WORKER_FAILED, 1),
        (JobState.FAILED, Reason.SAME_FAILURE, 1),
        (JobState.FAILED, Reason.SETUP_FAILED, 1),
        (JobState.CANCELLED, Reason.USER, 3),
        (JobState.FAILED, Reason.NO_CAPACITY, 4),
        (JobState.PAUSED, Reason.BUDGET, 5),
        (JobState.FAILED, Reason.MAX_DURATION, 5),
        (JobState.FAILED, Reason.HANG, 6),
        (JobState.FAILED, Reason.START_TIMEOUT, 6),
        (JobState.FAILED, Reason.INFRASTRUCTURE, 7),
        (JobState.FAILED, Reason.WORKER_LOST, 7),
        (JobState.PAUSED, Reason.USER, 8),
        (JobState.RUNNING, None, 0),
    ],
)
def test_exit_codes(state: JobState, reason: Reason | None, code: int) -> None:
    """A script can tell from the exit code alone how a job came to rest."""
    assert exit_code_of(ended(state, reason)) == code


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("reason", [None, *Reason])
def test_only_success_is_zero(state: JobState, reason: Reason | None) -> None:
    """No job that ended otherwise, or is paused, exits with 0."""
    code = exit_code_of(ended(state, reason))
    assert code in Exit
    resting = not state.active
    assert (code == 0) is (not resting or state is JobState.SUCCEEDED)


COLUMNS = [Column("NAME"), Column("STEP", right=True), Column("NOTE", drop=2), Column("X", drop=1)]
ROWS = [
    [Cell("digits"), Cell("7"), Cell("some words"), Cell("x")],
    [Cell("a"), Cell("1200"), Cell(""), Cell("")],
]


def test_columns_line_up() -> None:
    """Text is aligned left, numbers right, and no line ends in spaces."""
    assert lay_out(COLUMNS, ROWS, None) == [
        "NAME    STEP  NOTE        X",
        "digits     7  some words  x",
        "a       1200",
    ]


def test_a_narrow_terminal_loses_the_least_needed_column() -> None:
    """Columns leave in the order of their numbers; those without one stay."""
    assert lay_out(COLUMNS, ROWS, 20)[0] == "NAME    STEP  X"
    assert lay_out(COLUMNS, ROWS, 12)[1] == "digits     7"
    assert lay_out(COLUMNS, ROWS, 10)[1:] == ["dig…     7", "a     1200"]


@pytest.mark.parametrize("width", range(12, 40))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Whatever the width, nothing wraps."""
    assert all(len(line) <= width for line in lay_out(COLUMNS, ROWS, width))


def test_wide_characters_count_twice() -> None:
    """A name in Chinese does not push the next column away."""
    rows = [[Cell("数字"), Cell("1")], [Cell("ab"), Cell("2")]]
    assert lay_out([Column("NAME"), Column("N")], rows, None)[1:] == ["数字  1", "ab    2"]
    assert shorten("数字数字", 5) == "数字…"


def test_json_is_strict() -> None:
    """What JSON has no word for becomes text; every line can be parsed by anything."""
    record = {
        "loss": math.nan,
        "worst": [math.inf, -math.inf],
        "at": datetime(2026, 1, 1, tzinfo=UTC),
        "state": JobState.RUNNING,
        "code": Exit.PAUSED,
    }

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(json_line(record), parse_constant=refuse) == {
        "loss": "NaN",
        "worst": ["Infinity", "-Infinity"],
        "at": "2026-01-01T00:00:00+00:00",
        "state": "RUNNING",
        "code": 8,
    }


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m\x1b[0m"),
        ("\x1b[2Jgone\x1b]0;title\x07", "gone"),
        ("a\tb", "a       b"),
        ("bell\x07", "bell\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_line_cannot_move_the_cursor(written: str, shown: str) -> None:
    """Colours of a script stay; what would disturb the terminal goes."""
    assert shown_line(written) == shown


def test_a_very_long_line_is_cut_for_people() -> None:
    """A megabyte in one line does not fill the screen."""
    assert len(shown_line("x" * 1_000_000)) < LONGEST_LINE + 40
    assert shown_line("x" * 1_000_000).endswith("… (1,000,000 characters)")


def test_a_progress_bar_of_a_script_shows_its_last_state() -> None:
    """Of a line that was overwritten again and again, the end is shown."""
    assert shown_line("10%\r20%\r30%\r") == "30%"


@pytest.mark.parametrize(
    ("state", "intent", "is_told"),
    [
        (JobState.PAUSED, Intent.PAUSE, True),
        (JobState.STOPPING, Intent.PAUSE, True),
        (JobState.RUNNING, Intent.PAUSE, True),
        (JobState.SUCCEEDED, Intent.PAUSE, False),
        (JobState.FAILED, Intent.PAUSE, False),
        (JobState.STOPPING, Intent.CANCEL, False),
    ],
)
def test_only_a_paused_job_can_go_on(state: JobState, intent: Intent, is_told: bool) -> None:
    """`dtp pause` names the way back for a job that has one."""
    hint = how_to_go_on(replace(ended(state), intent=intent))
    assert hint == ("go on later: dtp resume a" if is_told else "")


DIRTY = "ValueError: \x1b[31mred\x1b[0m\x1b]0;title\x07 \x9b2Jbell\x07"


@pytest.mark.parametrize("colour", [True, False])
def test_words_of_a_script_carry_no_controls(
    capsys: pytest.CaptureFixture[str], colour: bool
) -> None:
    """An exception's escapes reach neither events, nor the reason of a failure, nor attempts."""
    out = Output()
    out.colour = False
    out.terminal = colour
    job = replace(ended(JobState.FAILED, Reason.WORKER_FAILED), detail=DIRTY)
    event = Event(1, job.created_at, job.id, 1, "controller", "failed", DIRTY)
    attempt = Attempt(job.id, 1, job.created_at, "secret", (), outcome=DIRTY)
    print_event(out, event, of_all=True)
    PlainFace(out).show(event)
    _print_attempts(out, [attempt])
    for line in summary(out, JobView(job, None, None), {}):
        out.say(line)
    shown = capsys.readouterr().out
    assert shown.count("ValueError: red bell") == 4
    assert all(char.isprintable() for char in shown.replace("\n", ""))
