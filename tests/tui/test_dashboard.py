"""The app on an engine in memory, driven by keys."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from textual._xterm_parser import XTermParser

from dtp_engine.errors import LedgerError
from dtp_engine.jobs import JobState
from dtp_tui.dashboard import DtpApp
from dtp_tui.screens.confirm import ConfirmDialog
from dtp_tui.screens.help import HelpScreen
from dtp_tui.screens.job import JobScreen
from dtp_tui.screens.jobs import JobsScreen
from dtp_tui.screens.resume import ResumeDialog
from dtp_tui.screens.scale import ScaleDialog
from dtp_tui.widgets.jobs_table import JobsTable

Until = Callable[..., Awaitable[None]]
Seen = Callable[[DtpApp], str]
SMALL = (80, 24)
LARGE = (200, 55)


def at(app: DtpApp, kind: type) -> Callable[[], bool]:
    return lambda: isinstance(app.screen, kind)


def has_jobs(app: DtpApp) -> Callable[[], bool]:
    """The home screen shows the jobs."""
    return lambda: at(app, JobsScreen)() and app.screen.query_one(JobsTable).key is not None


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_jobs_are_seen(
    engine: Any, app_of: Any, until: Until, seen: Seen, size: tuple[int, int]
) -> None:
    """On the smallest terminal and on a large one, with the header and the keys."""
    app = app_of(engine)
    async with app.run_test(size=size) as pilot:
        await until(pilot, has_jobs(app))
        screen = seen(app)
    assert "digits" in screen
    assert "Paused" in screen
    assert "1200/5000" in screen
    assert "P Pause" in screen
    assert "? Help" in screen
    assert {len(line) for line in screen.splitlines()} == {size[0]}


async def test_no_jobs_says_how_to_start_one(
    given: SimpleNamespace, app_of: Any, until: Until, seen: Seen
) -> None:
    """An empty cluster is not an empty screen."""
    app = app_of(given.engine())
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, lambda: "dtp run job.yaml" in seen(app))


async def test_a_job_is_opened_and_left(engine: Any, app_of: Any, until: Until) -> None:
    """Enter goes in, q comes back, q again leaves."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        await pilot.press("enter")
        await until(pilot, at(app, JobScreen))
        await pilot.press("q")
        await until(pilot, at(app, JobsScreen))
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)
    assert engine.closed


async def test_it_opens_on_the_job_of_the_command_line(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """By its name; a name that is none is said, and the jobs are shown."""
    app = app_of(engine, "kjv-language")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, lambda: "Jobs / kjv-language" in seen(app))
    app = app_of(engine, "nonsense")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, lambda: 'no job "nonsense"' in seen(app))
        assert isinstance(app.screen, JobsScreen)


async def test_charts_show_what_was_measured(
    engine: Any, given: SimpleNamespace, app_of: Any, until: Until, seen: Seen
) -> None:
    """Loss, throughput and step time with their newest values and a curve."""
    for n in range(60):
        engine.measure("digitsxx", given.window(given.now.timestamp() - 60 + n, n, loss=2 - n / 40))
    app = app_of(engine, "digits")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, lambda: "0.525" in seen(app))
        screen = seen(app)
    assert "8.20k samples/s" in screen
    assert "step 12 ms" in screen
    assert any(0x2800 < ord(char) <= 0x28FF for char in screen)


async def test_a_job_says_where_its_steps_take_their_time(
    engine: Any, given: SimpleNamespace, app_of: Any, until: Until, seen: Seen
) -> None:
    """In one line of 80 columns: the step, its largest phases, and the rank that holds it up."""
    shares = {"forward": 0.38, "backward": 0.4, "comm": 0.1, "optimizer": 0.1, "other": 0.02}
    found = {"step_s": 0.0412, "phases": shares, "verdict": "straggler rank 3"}
    engine.views = [
        replace(view, gang=view.gang and replace(view.gang, **found)) for view in engine.views
    ]
    app = app_of(engine, "digits")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, lambda: "straggler rank 3" in seen(app))
        line = next(line for line in seen(app).splitlines() if "straggler" in line)
    assert "step 41.2 ms: forward 38% backward 40% comm 10% optimizer 10%" in line


async def test_logs_come_in_and_are_filtered(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """Each key of the filter acts at once; escape shows all again."""
    engine.say("digitsxx", "loss 0.5", "lr 0.1", source="rank1")
    app = app_of(engine, "digits")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, at(app, JobScreen))
        await pilot.press("2")
        await until(pilot, lambda: "lr 0.1" in seen(app))
        await pilot.press("slash", *"loss", "enter")
        await until(pilot, lambda: "lr 0.1" not in seen(app))
        assert "1 of 2 lines" in seen(app)
        engine.say("digitsxx", "loss 0.4")
        await until(pilot, lambda: "loss 0.4" in seen(app))
        await pilot.press("escape")
        await until(pilot, lambda: "lr 0.1" in seen(app))


async def test_every_tab_shows_its_part(
    engine: Any, given: SimpleNamespace, app_of: Any, until: Until, seen: Seen
) -> None:
    """Workers, checkpoints, events and configuration, by number and by tab."""
    engine.saved["digitsxx"] = [given.checkpoint(1000)]
    engine.happen("digitsxx", "submitted", "submitted; 2 workers wished", "ana@laptop")
    app = app_of(engine, "digits")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, at(app, JobScreen))
        for key, words in (
            ("3", "● leads"),
            ("4", "5.0 MiB"),
            ("5", "ana@laptop"),
            ("6", "python train.py"),
            ("tab", "generation 1"),
        ):
            await pilot.press(key)
            await until(pilot, lambda words=words: words in seen(app))


async def test_pause_asks_and_does_nothing_by_default(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """Cancel has the focus: enter changes nothing."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        await pilot.press("P")
        await until(pilot, at(app, ConfirmDialog))
        assert "Pause digits?" in seen(app)
        assert app.focused is not None
        assert app.focused.id == "cancel"
        await pilot.press("enter")
        await until(pilot, at(app, JobsScreen))
    assert engine.asked == []


@pytest.mark.parametrize(("key", "verb"), [("P", "pause"), ("X", "stop")])
async def test_a_yes_is_carried_out_and_told(
    engine: Any, app_of: Any, until: Until, seen: Seen, key: str, verb: str
) -> None:
    """The engine is asked once, and the flash line says what came of it."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        await pilot.press(key)
        await until(pilot, at(app, ConfirmDialog))
        await pilot.press("right", "enter")
        await until(pilot, lambda: engine.asked != [])
        await until(pilot, lambda: "digits: " in seen(app).splitlines()[-2])
    assert engine.asked == [(verb, "digitsxx", None)]


async def test_scaling_takes_a_number_within_the_range(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """A digit chooses, the words follow, nine is brought down to the most there may be."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        await pilot.press("S")
        await until(pilot, at(app, ScaleDialog))
        await pilot.press("9")
        await until(pilot, lambda: "from 2 to 4 workers" in seen(app))
        await pilot.press("down", "y")
        await until(pilot, lambda: engine.asked != [])
    assert engine.asked == [("scale", "digitsxx", 3)]


async def test_resuming_offers_the_checkpoints(
    engine: Any, given: SimpleNamespace, app_of: Any, until: Until, seen: Seen
) -> None:
    """The newest good one is chosen beforehand; an older one says what it costs."""
    engine.saved["kjvlangu"] = [
        given.checkpoint(500),
        given.checkpoint(1000),
        given.checkpoint(1500, verified=False),
    ]
    app = app_of(engine, "kjv-language")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, at(app, JobScreen))
        await pilot.press("R")
        await until(pilot, at(app, ResumeDialog))
        await until(pilot, lambda: "from step 1,000" in seen(app))
        await pilot.press("down")
        await until(pilot, lambda: "500 steps after it will be trained again" in seen(app))
        await pilot.press("enter", "right", "enter")
        await until(pilot, lambda: engine.asked != [])
    assert engine.asked == [("resume", "kjvlangu", 500)]


async def test_a_refusal_is_told_in_one_line(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """What the engine refuses is no accident of the app."""
    engine.refuses = "digits is already being paused"
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        await pilot.press("P")
        await until(pilot, at(app, ConfirmDialog))
        await pilot.press("y")
        await until(pilot, lambda: "digits is already being paused" in seen(app))


async def test_verbs_that_cannot_be_say_why(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """R on a running job opens nothing, and says why."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        await pilot.press("R")
        await until(pilot, lambda: "digits is not paused" in seen(app))
        assert isinstance(app.screen, JobsScreen)
    assert engine.asked == []


async def test_lower_case_changes_nothing(engine: Any, app_of: Any, until: Until) -> None:
    """Every small letter, on both screens, asks the engine for no change."""
    for job in (None, "digits"):
        app = app_of(engine, job)
        async with app.run_test(size=SMALL) as pilot:
            await until(pilot, at(app, JobScreen if job else JobsScreen))
            await pilot.press(*"prsxkaceftjgl")
            await pilot.pause()
    assert engine.asked == []


async def test_commands_open_and_steer(engine: Any, app_of: Any, until: Until, seen: Seen) -> None:
    """By name from anywhere; a wrong one says what would be right."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        await pilot.press("colon", *"logs kjv-language", "enter")
        await until(pilot, lambda: "Jobs / kjv-language" in seen(app) and "following" in seen(app))
        await pilot.press("colon", *"wrokers", "enter")
        await until(pilot, lambda: "did you mean :workers?" in seen(app))
        await pilot.press("colon", *"jobs", "enter")
        await until(pilot, at(app, JobsScreen))
        await pilot.press("colon", *"pause digits", "enter")
        await until(pilot, at(app, ConfirmDialog))
        await pilot.press("escape")
        await pilot.press("colon", *"quit", "enter")
        await until(pilot, lambda: not app.is_running)
    assert engine.asked == []


async def test_jobs_are_filtered_as_one_types(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """And all are back after escape."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        await pilot.press("slash", *"kjv")
        await until(pilot, lambda: "1 of 3" in seen(app))
        await pilot.press("enter", "enter")
        await until(pilot, lambda: "Jobs / kjv-language" in seen(app))
        await pilot.press("q", "escape")
        await until(pilot, lambda: "1200/5000" in seen(app))


@pytest.mark.parametrize("job", [None, "digits"])
async def test_keys_typed_at_once_are_all_in_the_prompt(
    given: SimpleNamespace, app_of: Any, until: Until, seen: Seen, job: str | None
) -> None:
    """Pasted or typed ahead, no letter is lost or acts on the screen, on whichever screen."""
    fake = given.engine(given.job_view("digits"))
    app = app_of(fake, job)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, at(app, JobScreen) if job else has_jobs(app))
        type_at_once(app, ":pause endX:/P?q1.4\r")
        await until(pilot, lambda: 'no job "endX:/P?q1.4"' in seen(app))
        assert at(app, JobScreen if job else JobsScreen)()
    assert fake.asked == []


async def test_a_filter_typed_at_once_is_whole(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """Moving the cursor before it and opening what was found after it work as ever."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        type_at_once(app, "jk/kjv\r")
        await until(pilot, lambda: "1 of 3" in seen(app))
        await until(pilot, lambda: isinstance(app.focused, JobsTable))
        await pilot.press("enter")
        await until(pilot, lambda: "Jobs / kjv-language" in seen(app))


def type_at_once(app: DtpApp, text: str) -> None:
    """As a terminal sends them: all keys wait before the first is looked at."""
    for event in XTermParser().feed(text):
        app.post_message(event)


async def test_help_lists_keys_and_commands(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """For the screen that it was asked on."""
    app = app_of(engine, "digits")
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, at(app, JobScreen))
        await pilot.press("2", "question_mark")
        await until(pilot, at(app, HelpScreen))
        screen = seen(app)
        await pilot.press("escape")
        await until(pilot, at(app, JobScreen))
    for words in ("warnings and errors only", ":checkpoints", "UPPER CASE", "Finding machines"):
        assert words in screen


async def test_a_tall_screen_looks_into_the_selected_job(
    engine: Any, given: SimpleNamespace, app_of: Any, until: Until, seen: Seen
) -> None:
    """Its charts stand below the table, and follow the cursor."""
    for n in range(60):
        engine.measure("digitsxx", given.window(given.now.timestamp() - 60 + n, n, loss=2 - n / 40))
    app = app_of(engine)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, lambda: "0.525" in seen(app))
        await pilot.press("j")
        await until(pilot, lambda: "0.525" not in seen(app))


async def test_an_engine_that_does_not_answer_leaves_what_was_seen(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """With its age and the reason; when it answers again, all is well."""
    app = app_of(engine)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        engine.broken = LedgerError("the ledger is locked by another process")
        await until(pilot, lambda: "the ledger is locked" in seen(app))
        assert "stale" in seen(app)
        assert "digits" in seen(app)
        engine.broken = None
        await until(pilot, lambda: "stale" not in seen(app))


async def test_a_job_that_goes_on_after_a_pause_is_read_again(
    engine: Any, given: SimpleNamespace, app_of: Any, until: Until, seen: Seen
) -> None:
    """The log ends with the pause, and goes on with the next attempt."""
    engine.views = [given.job_view(state=JobState.PAUSED)]
    engine.say("digitsxx", "before the pause")
    app = app_of(engine, "digits")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, at(app, JobScreen))
        await pilot.press("2")
        await until(pilot, lambda: "before the pause" in seen(app))
        engine.views = [given.job_view()]
        engine.say("digitsxx", "after it")
        await until(pilot, lambda: "after it" in seen(app))
        assert seen(app).count("before the pause") == 1


async def test_keys_answer_while_lines_pour_in(
    engine: Any, app_of: Any, until: Until, seen: Seen
) -> None:
    """100,000 lines at once: the screen can be used, and shows the last of them in the end."""
    engine.say("digitsxx", *(f"line {n}" for n in range(100_000)))
    app = app_of(engine, "digits")
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, at(app, JobScreen))
        await pilot.press("3")
        await until(pilot, lambda: "● leads" in seen(app))
        await pilot.press("2")
        await until(pilot, lambda: "line 99999" in seen(app))
        await pilot.press("question_mark")
        await until(pilot, at(app, HelpScreen))


async def test_data_age_is_told_while_the_engine_is_silent(
    engine: Any, given: SimpleNamespace, app_of: Any, until: Until, seen: Seen
) -> None:
    """A call that never returns does not leave old numbers looking new, and q still leaves."""
    late = [given.now]
    app = app_of(engine, now=lambda: late[0])
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, has_jobs(app))
        engine.answers.clear()
        late[0] += timedelta(seconds=14)
        await until(pilot, lambda: "stale 14s" in seen(app))
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)
