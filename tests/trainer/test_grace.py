"""Promises about the grace of a stop: one that is too short for the state is told in time."""

from __future__ import annotations

import doctest

from dtp_trainer.checkpoints import grace
from dtp_trainer.checkpoints.grace import too_short
from dtp_trainer.gang.facts import absorb, grace_over
from dtp_trainer.gang.state import Committed, Rules, State
from dtp_trainer.wire import CheckpointEntry


def entry(step: int, seconds: float | None) -> CheckpointEntry:
    return CheckpointEntry(
        f"step-{step:06d}.g0001", step, 1, 1, 2, float(step), 5 << 30, seconds=seconds
    )


def test_examples_are_true() -> None:
    """What the docstrings show is what happens."""
    failed, tried = doctest.testmod(grace)
    assert (failed, tried > 0) == (0, True)


def test_what_is_raised_to_fits() -> None:
    """The grace that is proposed is enough for the same checkpoint, and what no spot machine gives
    is said to be that."""
    for seconds in (1.0, 27.1, 40.0, 83.0, 84.0, 500.0):
        said = too_short(entry(1, seconds), 1.0)
        assert said
        wanted = int(said.partition("raise stop_grace to ")[2].partition("s")[0])
        assert too_short(entry(1, seconds), wanted) is None
        assert ("spot gives 120 s" in said) == (wanted > 120)
    assert too_short(entry(1, None), 1.0) is None


def test_the_timeline_says_it_once() -> None:
    """A job whose checkpoints take longer than its stop may is told so with the first of them, and
    not with each."""
    rules = Rules(1, 2, 0, 0, start_within_s=30.0, grace_s=30.0)
    state = State(rules=rules, me=0, since=0.0)
    for step, seconds in ((1, 20.0), (2, 41.0), (3, 42.0)):
        state = absorb(state, Committed(entry(step, seconds)), 0.0)
    told = [event for event in state.chronicle.events if event.name == "grace_too_short"]
    assert [event.step for event in told] == [2]
    assert told[0].text == (
        "a checkpoint of 5.0 GiB takes about 41 s here, stop_grace is 30s: raise stop_grace to 60s"
    )


def test_a_short_time_is_not_said_to_be_none() -> None:
    """What takes less than a second has its digits, in both lines that tell of a short grace."""
    said = too_short(entry(1, 0.229), 0.2)
    assert said
    assert "takes about 0.23 s here, stop_grace is 0.2s" in said
    state = State(rules=Rules(1, 2, 0, 0, start_within_s=30.0, grace_s=0.2), me=0, since=0.0)
    told = grace_over(state, 0.0).chronicle.events[-1].text
    assert told.endswith("within the grace of 0.2 s")
