"""Promises of agreement, of SIGTERM's flag and of random generators, in one process."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from dtp_trainer.session import randomness
from dtp_trainer.session.agreement import ASK_WITHIN_STEPS, Agreement, Decision, Leave
from dtp_trainer.session.distributed import World
from dtp_trainer.session.stop import Paused, StopRequest

ALONE = World(0, 1, torch.device("cpu"), None, joined_here=False)
CPU = torch.device("cpu")


def test_a_wish_is_acted_on_after_the_next_step() -> None:
    """The answer comes while the next step runs."""
    agreement = Agreement(ALONE, 0)
    wish = Decision(Leave.PAUSED)
    assert agreement.decide(1, lambda: wish) == Decision()
    assert agreement.decide(2, lambda: wish) == wish


def test_at_a_boundary_a_wish_counts_at_once() -> None:
    """Together with what was asked before it."""
    agreement = Agreement(ALONE, 0)
    agreement.decide(1, lambda: Decision(checkpoint=True))
    both = agreement.decide_now(2, lambda: Decision(Leave.PAUSED))
    assert both == Decision(Leave.PAUSED, checkpoint=True)


def test_a_checkpoint_is_made_once_for_one_wish() -> None:
    """Though it is still wished when the ranks ask again, before it was made."""
    agreement = Agreement(ALONE, 0)
    wished = iter([True, True, *[False] * 200])
    asked = [
        agreement.decide_now(step, lambda: Decision(checkpoint=next(wished)))
        if step == 2
        else agreement.decide(step, lambda: Decision(checkpoint=next(wished)))
        for step in range(1, 100)
    ]
    assert [decision.checkpoint for decision in asked].count(True) == 1


def test_fast_steps_are_asked_about_now_and_then() -> None:
    """Not at every step, and never more than so many steps apart."""
    agreement = Agreement(ALONE, 0)
    asked: list[int] = []
    now = 0

    def wish() -> Decision:
        asked.append(now)
        return Decision()

    for now in range(1, 500):
        agreement.decide(now, wish)
    gaps = np.diff(asked)
    assert 1 <= gaps.min() <= gaps.max() <= ASK_WITHIN_STEPS + 1
    assert len(asked) < 100


def test_the_strongest_wish_wins() -> None:
    """To be fenced is stronger than to pause."""
    agreement = Agreement(ALONE, 0)
    agreement.decide(1, lambda: Decision(Leave.FENCED))
    assert agreement.decide_now(2, lambda: Decision(Leave.PAUSED)).leave is Leave.FENCED


def test_outside_the_main_thread_nothing_is_taken_over() -> None:
    """Python delivers signals to the main thread only; the caller is told."""
    heard: list[bool] = []
    thread = threading.Thread(target=lambda: heard.append(StopRequest().listen()))
    thread.start()
    thread.join()
    assert heard == [False]


def test_pausing_is_an_exit_that_no_handler_of_errors_sees() -> None:
    """`except Exception` lets it pass; the code says what it was."""
    assert not issubclass(Paused, Exception)
    with pytest.raises(SystemExit) as ended:
        raise Paused
    assert ended.value.code == 75


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


def test_generators_go_on_where_they_were() -> None:
    """Python's, numpy's and torch's give the same numbers again."""
    state = randomness.capture(CPU)
    first = draws()
    randomness.restore(state, CPU)
    assert draws() == first


def test_new_ranks_draw_different_numbers_the_same_each_time() -> None:
    """By step, rank and number of ranks."""
    seen = []
    for place in ((5, 0, 3), (5, 1, 3), (6, 0, 3), (5, 0, 2), (5, 0, 3)):
        torch.manual_seed(0)
        randomness.reseed(*place)
        seen.append(tuple(draws()))
    assert seen[0] == seen[4]
    assert len(set(seen)) == 4
