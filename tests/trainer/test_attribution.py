"""Where the time of a job's steps goes, and the one word for it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from dtp_trainer.gang.attribution import Attribution, Verdict, told, verdict
from dtp_trainer.gang.messages import Beat
from dtp_trainer.gang.progress import Progress, begun, heard
from dtp_trainer.wire import Window

EVEN = {"step": 0.1, "data": 0.005, "forward": 0.04, "backward": 0.045, "comm": 0.01}


def rank(**seconds: float) -> dict[str, float]:
    """A rank of a step of 100 ms; what its other phases leave is the backward pass."""
    rest = {"step": 0.1, "data": 0.005, "forward": 0.03, "comm": 0.01, **seconds}
    own = sum(value for name, value in rest.items() if name not in ("step", "evaluate"))
    return {**rest, "backward": 0.1 - own}


def told_by(*ranks: Mapping[str, float]) -> Attribution:
    """Two ranks a worker, of one window each."""
    known = Attribution()
    for worker in range((len(ranks) + 1) // 2):
        mine = range(2 * worker, min(2 * worker + 2, len(ranks)))
        known = told(known, worker, 1.0, {str(number): ranks[number] for number in mine})
    return known


@pytest.mark.parametrize(
    ("ranks", "word"),
    [
        ([rank()], "compute"),
        ([rank(), rank()], "compute"),
        ([rank(data=0.03)] * 2, "data-bound"),
        ([rank(data=0.012, h2d=0.012)] * 2, "data-bound"),
        ([rank(comm=0.03)] * 2, "comm-bound"),
        ([rank(checkpoint=0.012)] * 2, "checkpoint"),
        ([rank(checkpoint=0.012, comm=0.03)] * 2, "comm-bound"),
        ([rank(data=0.03, comm=0.02)] * 2, "data-bound"),
        ([rank(comm=0.05), rank(comm=0.02)], "straggler rank 1"),
        ([rank(comm=0.03), rank(comm=0.02)], "comm-bound"),
        ([rank(comm=0.05)] * 3 + [rank(comm=0.02)] + [rank(comm=0.05)] * 4, "straggler rank 3"),
        # The straggler waits for its data; that is where to look, but it is one rank's matter.
        ([rank(comm=0.06), rank(comm=0.0, data=0.06)], "straggler rank 1"),
        # Half of the ranks being slow is no straggler's doing, but one of them is named.
        ([rank(comm=0.05), rank(comm=0.05), rank(comm=0.01), rank(comm=0.01)], "straggler rank 2"),
        # An evaluation is none of the step's time.
        ([rank(evaluate=5.0)], "compute"),
    ],
)
def test_verdict(ranks: list[dict[str, float]], word: str) -> None:
    """One word, by documented shares of the step."""
    assert verdict(told_by(*ranks)).word == word


@pytest.mark.parametrize(
    "ranks",
    [
        [],
        [{"step": 0.0}],
        [{"step": 0.1, "data": 0.001}],
        [{"step": 0.1, "forward": 0.05, "backward": 0.05}] * 2,
    ],
)
def test_no_verdict_where_nobody_can_tell(ranks: list[dict[str, float]]) -> None:
    """No steps; a script whose passes nobody sees; ranks whose communication is unknown."""
    assert verdict(told_by(*ranks)) == Verdict()


def test_what_is_known_is_told_though_communication_is_not() -> None:
    """A wait for data needs no number of the other ranks."""
    slow = {"step": 0.1, "data": 0.04, "forward": 0.03, "backward": 0.03}
    assert verdict(told_by(slow, slow)).word == "data-bound"


def test_a_straggler_comes_with_the_phase_that_is_longer() -> None:
    """So that one knows where to look on that rank."""
    found = verdict(told_by(rank(comm=0.06), rank(comm=0.0, data=0.065)))
    assert found.why == "60 ms a step longer than the others in data"


def test_shares_are_of_the_whole_step() -> None:
    """Over all ranks, they add up to one, whatever rank spent it."""
    known = told_by(EVEN, {**EVEN, "comm": 0.0, "other": 0.01})
    assert known.step_s == pytest.approx(0.1)
    assert sum(known.shares.values()) == pytest.approx(1.0)
    assert known.shares["comm"] == pytest.approx(0.05)


def test_the_warming_up_is_forgotten() -> None:
    """The second window of a generation replaces the first; later ones count by and by."""
    known = told(Attribution(), 0, 1.0, {"0": {"step": 9.0}})
    known = told(known, 0, 2.0, {"0": {"step": 1.0}})
    assert known.step_s == 1.0
    known = told(known, 0, 3.0, {"0": {"step": 2.0}})
    assert known.step_s == pytest.approx(1.3)


def test_a_window_told_twice_counts_once() -> None:
    """Beats repeat the newest window until there is another."""
    known = told_by(EVEN)
    assert told(known, 0, 1.0, {"0": {"step": 9.0}}) is known


def test_numbers_of_an_older_generation_are_left_aside() -> None:
    """Other ranks, other machines: a generation begins without them."""
    window = Window(5.0, 7, 0, 0, 1, 3, 1, 0.0, None, {}, None, None, {})
    beat = Beat(7, {"0": 3}, window=window, phases={"0": EVEN})
    progress = begun(Progress(), [0], now=0.0)
    assert heard(progress, 0, beat, generation=8, now=1.0).attribution == Attribution()
    progress = heard(progress, 0, beat, generation=7, now=1.0)
    assert progress.attribution.step_s == pytest.approx(0.1)
    assert begun(progress, [0], now=2.0).attribution == Attribution()
