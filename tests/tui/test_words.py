"""Consequences, commands and the header: words that an operator acts upon."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest

from dtp_engine.jobs import Intent, JobState, NodeRange
from dtp_engine.series import MetricHistory
from dtp_tui import consequences
from dtp_tui.commandline import BadCommand, Order, parse, suggestions
from dtp_tui.messages import ClusterPicture, JobPicture, Verb
from dtp_tui.widgets.job_plots import Past, loss_name, plots, time_range
from dtp_tui.widgets.key_line import key_line
from dtp_tui.widgets.overview import remaining
from dtp_tui.widgets.status_bar import status_line


def test_pausing_says_what_is_kept(given: SimpleNamespace) -> None:
    """Workers, steps and time since the last checkpoint, and that nothing is lost."""
    words = "\n".join(consequences.pause(given.job_view(), given.now).lines)
    assert "2 workers" in words
    assert "step 1,000, 30s ago (200 steps since)" in words
    assert "Nothing is lost" in words


def test_pausing_a_script_without_steps_warns(given: SimpleNamespace) -> None:
    """It would begin again."""
    view = given.job_view(step=None, saved_at_step=None)
    words = "\n".join(consequences.pause(view, given.now).lines)
    assert "No checkpoint exists yet." in words
    assert "from the beginning" in words


def test_stopping_says_that_it_is_for_good(given: SimpleNamespace) -> None:
    """And that checkpoints stay."""
    consequence = consequences.stop(given.job_view(), given.now)
    assert consequence.title == "Stop digits for good?"
    assert "checkpoints are kept" in "\n".join(consequence.lines)


def test_what_holds_no_machine_is_told_so(given: SimpleNamespace) -> None:
    """A queued or paused job has no workers that could checkpoint."""
    queued = given.job_view(state=JobState.QUEUED, step=None)
    assert "holds no machine" in consequences.pause(queued, given.now).lines[0]
    paused = given.job_view(state=JobState.PAUSED)
    assert "holds no machine" in consequences.stop(paused, given.now).lines[0]


def test_resuming_from_an_older_checkpoint_says_what_is_trained_again(
    given: SimpleNamespace,
) -> None:
    """By the number of steps."""
    older, newest = given.checkpoint(1000), given.checkpoint(1500)
    view = given.job_view(state=JobState.PAUSED)
    words = "\n".join(consequences.resume(view, older, newest, given.now).lines)
    assert "from step 1,000" in words
    assert "The 500 steps after it will be trained again." in words


def test_scaling_says_who_comes_or_goes(given: SimpleNamespace) -> None:
    """More, fewer, or nothing to do."""
    view = given.job_view()
    assert "2 workers more" in consequences.scale(view, 4).lines[0]
    assert "1 worker will leave" in consequences.scale(view, 1).lines[0]
    assert consequences.scale(view, 2).lines == ("That is what it has now.",)


@pytest.mark.parametrize(
    ("verb", "state", "possible"),
    [
        (Verb.PAUSE, JobState.RUNNING, True),
        (Verb.PAUSE, JobState.PAUSED, False),
        (Verb.RESUME, JobState.PAUSED, True),
        (Verb.RESUME, JobState.RUNNING, False),
        (Verb.RESUME, JobState.SUCCEEDED, False),
        (Verb.STOP, JobState.PAUSED, True),
        (Verb.STOP, JobState.FAILED, False),
        (Verb.SCALE, JobState.RUNNING, True),
        (Verb.SCALE, JobState.CANCELLED, False),
    ],
)
def test_verbs_that_make_no_sense_are_refused(
    given: SimpleNamespace, verb: Verb, state: JobState, *, possible: bool
) -> None:
    """Before a dialog is opened, with the reason."""
    reason = consequences.refusal(verb, given.job_view(state=state).job)
    assert (reason is None) is possible


def test_a_job_of_fixed_size_cannot_be_scaled(given: SimpleNamespace) -> None:
    """The reason names the field."""
    view = given.job_view(nodes=NodeRange(2, 2))
    assert "nodes: 2" in str(consequences.refusal(Verb.SCALE, view.job))


def test_a_job_that_is_pausing_cannot_be_paused_again(given: SimpleNamespace) -> None:
    """What counts is what was asked for, not only what is."""
    job = replace(given.job_view().job, intent=Intent.PAUSE)
    assert consequences.refusal(Verb.PAUSE, job) is not None


def test_commands_are_understood() -> None:
    """Names, aliases, with and without a job."""
    assert parse("jobs") == Order("jobs", "")
    assert parse(" J ") == Order("jobs", "")
    assert parse("logs digits") == Order("logs", "digits")
    assert parse("pause") == Order("pause", "")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("wrokers", "did you mean :workers?"),
        ("zzz", ":help"),
        ("job", "which job?"),
        ("quit now", "too many words"),
        ("", ":jobs"),
    ],
)
def test_a_wrong_command_says_what_would_be_right(text: str, hint: str) -> None:
    """One line, with the nearest name."""
    with pytest.raises(BadCommand, match=hint.replace("?", r"\?")):
        parse(text)


def test_suggestions_know_the_jobs() -> None:
    """Commands first, then each with each name."""
    lines = suggestions(["digits", "digits"])
    assert lines[0] == "jobs"
    assert lines.count("logs digits") == 1


def test_the_header_counts_jobs_and_capacity(given: SimpleNamespace) -> None:
    """In words where there is room, in glyphs on 80 columns."""
    views = (given.job_view(), given.job_view("kjv", JobState.PAUSED))
    picture = ClusterPicture(given.now, given.now, views)
    assert "1 running" in str(status_line(picture, "local"))
    assert "1 paused" in str(status_line(picture, "local"))
    assert "running" not in str(status_line(picture, "local", is_narrow=True))
    assert str(status_line(picture, "local")).endswith("live ")


def test_stale_data_are_called_stale(given: SimpleNamespace) -> None:
    """With their age; old numbers never look new."""
    later = given.now + timedelta(seconds=14)
    picture = ClusterPicture(given.now, later, problem="the ledger is locked")
    assert "stale 14s" in str(status_line(picture, "local"))


def test_the_key_line_always_has_help() -> None:
    """However little room there is."""
    keys = [("P", "Pause", True), ("S", "Scale", False), ("?", "Help", True)]
    assert "? Help" in str(key_line(keys, 20))
    assert "Scale" not in str(key_line(keys, 20))


def test_the_past_is_widened_and_narrowed() -> None:
    """Step by step, to all of it and back."""
    past = Past()
    closer = past.closer()
    assert closer.window_s == 6 * 3600
    assert closer.wider() == past
    assert past.turned().turned() == past


def test_the_time_axis_stands_still_for_a_while(given: SimpleNamespace) -> None:
    """A chart is not redrawn from the left at every sample."""
    history = MetricHistory()
    ends = set()
    for at in range(1000, 1100):
        history.add(1, given.window(float(at), at))
        ends.add(time_range(history, Past(), given.now, alive=True))
    assert len(ends) < 15
    assert all(end - start >= 20 for start, end in ends)


def test_the_charts_of_a_job(given: SimpleNamespace) -> None:
    """Four, with the newest values in words, and none fails before the first sample."""
    history = MetricHistory()
    picture = JobPicture(given.now, given.job_view(), history, 0)
    assert set(plots(picture, Past())) == {"loss", "throughput", "resources", "step-time"}
    for step in range(100):
        history.add(1, given.window(1000.0 + step, 10 * step, accuracy=0.9, train_loss=2.0))
    assert loss_name(history) == "train_loss"
    shown = plots(picture, Past().turned())
    assert shown["loss"].curves[0].newest == "2"
    assert shown["step-time"].curves[0].newest == "12 ms"
    assert shown["throughput"].curves[0].view(40)


def test_time_left_is_told_at_the_newest_pace(given: SimpleNamespace) -> None:
    """Steps that remain, times what one takes; nothing while nobody can tell."""
    history = MetricHistory()
    picture = JobPicture(given.now, given.job_view(step=1000), history, 0)
    assert remaining(picture) is None
    history.add(1, given.window(1.0, 1000))
    assert remaining(picture) == pytest.approx(4000 * 0.012)
