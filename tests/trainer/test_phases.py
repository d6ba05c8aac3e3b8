"""Where the time of a step goes, as found by hooks alone."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtp_trainer.session.exchange import Exchange
from dtp_trainer.session.phases import (
    FORGET_AFTER_LAPS,
    READ_AFTER_LAPS,
    HostClock,
    Phases,
    _Hook,
)

CPU = torch.device("cpu")


class HandClock(HostClock):
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now


class Slow(nn.Module):
    """A pass takes 2 s forward and 3 s backward."""

    def __init__(self, clock: HandClock) -> None:
        super().__init__()
        self.layer, self.clock = nn.Linear(2, 2), clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 2
        y: Tensor = self.layer(x)
        if y.requires_grad:
            y.register_hook(lambda _: self.backward_passed())
        return y

    def backward_passed(self) -> None:
        self.clock.now += 3


# From then on torch calls the hooks of this class too, beside those of a class made from it.
torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


class Sgd(torch.optim.SGD):
    """A step takes 1 s."""

    clock: HandClock

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.clock.now += 1


class Bench:
    """A model, its optimizer, and the phases that follow them."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.model = Slow(self.clock)
        self.optimizer = Sgd(self.model.parameters(), lr=0.1)
        self.optimizer.clock = self.clock
        self.phases = Phases(CPU)
        self.phases._clock = self.clock
        self.phases.lap()
        self.phases.lap()
        self.phases.follow_model(self.model)
        self.phases.follow_optimizer(self.optimizer)

    def pass_(self) -> None:
        self.model(torch.ones(1, 2)).sum().backward()

    def lap(self) -> dict[str, float]:
        """Of phases that took time."""
        return {name: seconds for name, seconds in self.phases.lap().items() if seconds}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_plain_loop_is_told_apart_without_its_help(bench: Bench) -> None:
    """Forward, backward (the loss included) and optimizer, and the phases are the whole step."""
    bench.clock.now += 0.5
    bench.pass_()
    bench.optimizer.step()
    bench.clock.now += 0.25
    assert bench.lap() == {
        "step": 6.75,
        "forward": 2.0,
        "backward": 3.0,
        "optimizer": 1.0,
        "other": 0.75,
    }


def test_parts_of_a_step_add_up(bench: Bench) -> None:
    """Three passes before one step of the optimizer are three forwards and three backwards."""
    for _ in range(3):
        bench.pass_()
    bench.optimizer.step()
    assert bench.lap() == {"step": 16.0, "forward": 6.0, "backward": 9.0, "optimizer": 1.0}


def test_an_evaluation_is_no_time_of_the_step(bench: Bench) -> None:
    """Its passes count as `evaluate`, with and without gradients, and not in the step's time."""
    bench.pass_()
    with bench.phases.evaluating():
        bench.model(torch.ones(1, 2))
        with torch.no_grad():
            bench.model(torch.ones(1, 2))
    assert bench.lap() == {"step": 5.0, "forward": 2.0, "backward": 3.0, "evaluate": 4.0}


def test_a_pass_without_gradients_is_no_forward(bench: Bench) -> None:
    """A teacher or a sample drawn in the step belongs to what is left."""
    with torch.no_grad():
        bench.model(torch.ones(1, 2))
    assert bench.lap() == {"step": 2.0, "other": 2.0}


def test_a_phase_within_a_phase_is_its_own(bench: Bench) -> None:
    """What the script waits for between two parts is taken out of the backward pass."""
    bench.pass_()
    with bench.phases.phase("data"):
        bench.clock.now += 7
    bench.pass_()
    assert bench.lap() == {"step": 17.0, "forward": 4.0, "backward": 6.0, "data": 7.0}


def test_a_lap_knows_nothing_of_the_one_before(bench: Bench) -> None:
    """An optimizer that was never called, or a pass that failed, leaves no phase open."""
    with pytest.raises(RuntimeError):
        bench.model(torch.ones(1, 3))
    bench.phases.lap()
    bench.clock.now += 1
    assert bench.lap() == {"step": 1.0, "other": 1.0}


def test_a_copy_of_the_model_is_not_followed(bench: Bench) -> None:
    """A moving average made by deepcopy, or a model sent by pickle, is no part of the step."""
    twins = [copy.deepcopy(bench.model), pickle.loads(pickle.dumps(bench.model))]
    for twin in twins:
        twin.clock = bench.clock
        twin(torch.ones(1, 2))
    assert bench.lap() == {"step": 4.0, "other": 4.0}


def test_a_model_compiled_in_place_keeps_one_graph(bench: Bench) -> None:
    """The borders are set around the compiled call, not in it."""

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._compiled_call_impl = lambda *_: bench.model.forward(torch.ones(1, 2))

    model = Compiled()
    bench.phases.follow_model(model)
    model(torch.ones(1))
    bench.clock.now += 3
    assert bench.lap() == {"step": 5.0, "forward": 2.0, "backward": 3.0}
    assert not model._forward_pre_hooks


class Numbers:
    """What DDP tells of itself, in nanoseconds."""

    def __init__(self, **told: int) -> None:
        self.told = told
        self.rates: list[int] = []

    def _get_ddp_logging_data(self) -> dict[str, Any]:
        return self.told

    def _set_ddp_runtime_logging_sample_rate(self, rate: int) -> None:
        self.rates.append(rate)


MEASURED = {"backward_comm_time": 90_000_000, "backward_compute_comm_overlap_time": 30_000_000}


@pytest.mark.parametrize(
    ("told", "exposed"),
    [
        (MEASURED, 0.06),
        ({**MEASURED, "backward_compute_comm_overlap_time": 95_000_000}, 0.0),
        ({"backward_comm_time": 90_000_000}, None),
        ({}, None),
        ({**MEASURED, "backward_comm_time": "n/a"}, None),
    ],
)
def test_exposed_communication(told: dict[str, Any], exposed: float | None) -> None:
    """It is what was not hidden behind the backward pass; a number that this torch does not have
    is none, and no error."""
    exchange = Exchange(choose_rate=True)
    exchange._models.append(Numbers(**told))
    assert exchange.exposed_s(0.01) == (None if exposed is None else pytest.approx(exposed))


def test_a_torch_without_these_numbers_is_asked_once() -> None:
    """What is not there costs the number only."""
    exchange = Exchange(choose_rate=True)
    exchange._models.append(object())
    assert exchange.exposed_s(0.01) is None
    assert exchange._models == []


@pytest.mark.parametrize(("step_s", "rates"), [(0.025, [10]), (1e-6, []), (5.0, [1])])
def test_about_four_steps_a_second_are_measured(step_s: float, rates: list[int]) -> None:
    """Of fast steps one in a hundred, as is DDP's own habit."""
    exchange, numbers = Exchange(choose_rate=True), Numbers(**MEASURED)
    exchange._models.append(numbers)
    exchange.exposed_s(step_s)
    assert numbers.rates == rates


def test_a_hook_of_a_copy_does_nothing() -> None:
    """It holds nothing that could keep the original alive."""
    assert copy.copy(_Hook(lambda: None))._call is None


class Late:
    """A device that comes past marks when it is told to; they are as far apart as their numbers."""

    def __init__(self) -> None:
        self.made = self.passed = 0
        self.reused: list[int] = []

    def mark(self) -> int:
        self.made += 1
        return self.made

    def seconds(self, marks: list[int]) -> list[float] | None:
        if marks[-1] > self.passed:
            return None
        return [float(after - before) for before, after in pairwise(marks)]

    def reuse(self, marks: list[int]) -> None:
        self.reused += marks


@pytest.fixture
def late() -> tuple[Phases, Late]:
    phases = Phases(CPU)
    clock = Late()
    phases._clock, phases._read_after = clock, READ_AFTER_LAPS  # type: ignore[assignment]
    phases._borders = [("other", clock.mark())]
    return phases, clock


def lap(phases: Phases, name: str) -> dict[str, float]:
    with phases.phase(name):
        pass
    return phases.lap()


def test_a_device_is_read_two_steps_later(late: tuple[Phases, Late]) -> None:
    """By then it has come past the step, as a rule; each step's own numbers, in their order."""
    phases, clock = late
    clock.passed = 1000
    told = [lap(phases, f"step {number}") for number in range(4)]
    assert [set(seconds) for seconds in told] == [
        {"step"},
        {"step"},
        {"step", "other", "step 0"},
        {"step", "other", "step 1"},
    ]


def test_a_device_that_is_behind_is_not_waited_for(late: tuple[Phases, Late]) -> None:
    """Its steps are told once it has come past them; a mark is used again only after that."""
    phases, clock = late
    assert all(set(lap(phases, "forward")) == {"step"} for _ in range(5))
    assert clock.reused == []
    clock.passed = clock.made
    assert "forward" in lap(phases, "forward")
    assert clock.reused == sorted(clock.reused)
    assert max(clock.reused) < clock.passed


def test_a_device_that_never_comes_past_costs_no_memory(late: tuple[Phases, Late]) -> None:
    """Steps that nobody could read are forgotten."""
    phases, _ = late
    for _ in range(100):
        lap(phases, "forward")
    assert len(phases._laps) <= FORGET_AFTER_LAPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_phases_of_a_gpu_come_two_steps_later() -> None:
    """They are the GPU's own times, read when it has come past them."""
    device = torch.device("cuda")
    model = nn.Linear(2048, 2048, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    phases = Phases(device)
    phases.follow_model(model)
    phases.follow_optimizer(optimizer)
    laps = []
    for _ in range(6):
        model(torch.ones(2048, 2048, device=device)).sum().backward()
        optimizer.step()
        torch.cuda.synchronize()
        laps.append(phases.lap())
    assert [len(lap) > 1 for lap in laps] == [False, False, True, True, True, True]
    assert {"step", "forward", "backward", "optimizer", "other"} == set(laps[-1])
    assert all(seconds >= 0 for seconds in laps[-1].values())
