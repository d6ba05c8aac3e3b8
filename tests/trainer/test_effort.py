"""What a failure costs: steps and seconds between where a generation ended and the next began."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from dtp_trainer.gang import effort
from dtp_trainer.gang.effort import KEPT, Ledger, Loss
from dtp_trainer.gang.messages import Beat, Effort
from dtp_trainer.gang.state import Committed, Said
from dtp_trainer.wire import CheckpointEntry
from tests.trainer.test_gang import RULES, Table


def trained(ledger: Ledger, began: int, *steps: tuple[int, float]) -> tuple[Ledger, Loss | None]:
    """A generation that began after `began` and told so often of its step and seconds."""
    first = Effort(began, *steps[0])
    assert effort.begins(ledger, first)
    ledger, loss = effort.went_back(ledger, first)
    for step, seconds in steps:
        ledger = effort.advanced(ledger, Effort(began, step, seconds))
    return ledger, loss


def test_first_generation_loses_nothing() -> None:
    """Nothing was before it, so nothing is said."""
    assert trained(Ledger(), 0, (10, 1.0))[1] is None


def test_failure_costs_what_lies_behind_the_checkpoint() -> None:
    """Seconds are those of the very steps that are taken again, between what was told of."""
    ledger, _ = trained(Ledger(), 0, (100, 10.0), (130, 16.0))
    _, loss = trained(effort.opened(ledger, 132), 120, (121, 0.2))
    assert loss is not None
    assert (loss.reached, loss.back_to, loss.steps) == (132, 120, 12)
    assert loss.seconds is not None
    assert abs(loss.seconds - 12 * 0.2) < 1e-9


def test_two_failures_behind_one_checkpoint() -> None:
    """Each costs what its own generation had done."""
    ledger, _ = trained(Ledger(), 0, (100, 10.0), (130, 16.0))
    ledger, _ = trained(effort.opened(ledger, 130), 120, (125, 2.5))
    _, loss = trained(effort.opened(ledger, 125), 120, (121, 0.5))
    assert loss == Loss(125, 120, 2.5)


def test_generation_that_took_no_step() -> None:
    """What the one before it had reached is still what is lost."""
    ledger, _ = trained(Ledger(), 0, (100, 10.0), (130, 16.0))
    ledger = effort.opened(effort.opened(ledger, 130), 0)
    assert trained(ledger, 120, (121, 0.2))[1] == Loss(130, 120, 2.0)


def test_scale_redoes_nothing() -> None:
    """Where it ended is where it goes on."""
    ledger, _ = trained(Ledger(), 0, (100, 10.0))
    _, loss = trained(effort.opened(ledger, 100), 100, (101, 0.1))
    assert loss is not None
    assert effort.describe(loss) == "goes on at step 100: no step redone"


def test_a_new_leader_knows_what_the_last_one_published() -> None:
    """Seconds since the checkpoint go from leader to leader with the step."""
    _, loss = trained(effort.inherited(130, 120, 4.1), 120, (121, 0.4))
    assert loss is not None
    assert effort.describe(loss).endswith("10 steps, 4.1 s of training lost")
    _, unknown = trained(effort.inherited(130, 120, None), 120, (121, 0.4))
    assert unknown is not None
    assert effort.describe(unknown).endswith("to 120: 10 steps lost")


def test_a_long_generation_is_kept_short() -> None:
    """Points are bounded, and still tell any stretch."""
    told = [(step, step * 0.5) for step in range(1, 5000)]
    ledger, _ = trained(Ledger(), 0, *told)
    assert len(ledger.points) <= KEPT + 1
    assert all(a.step < b.step and a.seconds < b.seconds for a, b in pairwise(ledger.points))
    assert ledger.between(1000, 4999) == (4999 - 1000) * 0.5


def failed_after(step: int, *, saved: int) -> str:
    """What is said at the end of a gang of one rank, whose step takes 0.1 s, without a budget."""
    table = Table(replace(RULES, error_budget=0), wished=1)
    table.run(0)
    beat = Beat(1, {"0": step}, reporting=True, effort=Effort(0, step, step / 10))
    table.feed(Said(0, beat))
    if saved:
        entry = CheckpointEntry(f"step-{saved:06d}.g0001", saved, 1, 1, 1, 0.0, 100)
        table.feed(Committed(entry))
    table.exits(0, 1, error="ValueError: bad batch", step=step)
    assert table.state.detail == "rank 0 failed: ValueError: bad batch"
    return table.state.chronicle.events[-1].text.removeprefix(table.state.detail)


def test_a_failure_that_ends_the_gang_says_what_is_lost() -> None:
    """Steps and seconds behind the newest checkpoint, or that there is none."""
    assert failed_after(130, saved=120) == "; 10 steps, 1.0 s of training since step 120 are lost"
    assert failed_after(3, saved=0) == "; no checkpoint holds its 3 steps, 0.3 s of training"
    assert failed_after(120, saved=120) == ""
