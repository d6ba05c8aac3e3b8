"""The leader's state machine: what it does in each situation, and what it never does in any."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest

from dtp_trainer.gang import rules as gang
from dtp_trainer.gang.messages import Beat, Hello, Leaving, RankExited, RanksGone
from dtp_trainer.gang.state import (
    Committed,
    DismissWorker,
    DrainRanks,
    Drop,
    End,
    Input,
    KillRanks,
    Lost,
    Output,
    Phase,
    Prepare,
    Prepared,
    Resign,
    Rules,
    Said,
    StartSeat,
    State,
    Tick,
    Unprepared,
)
from dtp_trainer.wire import CheckpointEntry, ExitCode, Window

RULES = Rules(
    min_workers=1,
    max_workers=4,
    error_budget=2,
    hang_budget=1,
    start_within_s=60,
    grace_s=10,
)


class Table:
    """A leader at whose table inputs are laid one by one; time moves when told to."""

    def __init__(self, rules: Rules = RULES, *, wished: int = 2) -> None:
        self.now = 1000.0
        self.wished = wished
        self.state = State(rules, me=0, since=self.now, wished=wished)
        self.done: list[Output] = []

    def feed(self, given: Input) -> list[Output]:
        self.state, outputs = gang.step(self.state, given, self.now)
        self.done = list(outputs)
        return self.done

    def join(self, *workers: int, **hello: object) -> list[Output]:
        done: list[Output] = []
        for worker in workers:
            greeting = Hello(worker, "10.0.0.1", 1, self.wished)
            done += self.feed(Said(worker, replace(greeting, **hello)))  # type: ignore[arg-type]
        return done

    def prepared(self) -> list[Output]:
        return self.feed(Prepared(self.state.ticket, self.state.generation + 1, 29500))

    def run(self, *workers: int) -> list[Output]:
        self.join(*workers)
        return self.prepared()

    def wait(self, seconds: float) -> list[Output]:
        self.now += seconds
        return self.feed(Tick())

    def leave(self, *workers: int) -> list[Output]:
        return [o for worker in workers for o in self.feed(Said(worker, Leaving()))]

    def beat(self, worker: int, steps: dict[str, int], window: Window | None = None) -> None:
        beat = Beat(self.state.generation, steps, reporting=True, window=window)
        self.feed(Said(worker, beat))

    def exits(self, worker: int, code: int = 0, **how: object) -> list[Output]:
        """The worker's rank ends, and with it all that runs there."""
        seat = next(seat for seat in self.state.seats if seat.worker == worker)
        exited = RankExited(self.state.generation, seat.first_rank, code)
        done = self.feed(Said(worker, replace(exited, **how)))  # type: ignore[arg-type]
        return done + self.feed(Said(worker, RanksGone(self.state.generation)))

    def killed(self, *workers: int) -> list[Output]:
        return [o for worker in workers for o in self.exits(worker, -9, killed=True)]

    @property
    def story(self) -> list[str]:
        return [event.name for event in self.state.chronicle.events]


def window(step: int, total: int | None) -> Window:
    return Window(0.0, 1, 0, 0, 2, step, 1, 0.0, total, {}, 10.0, None, {})


def kinds(outputs: Iterable[Output]) -> list[type]:
    return [type(output) for output in outputs]


# ----------------------------------------------------------------------------------------- forming


def test_waits_for_all_wished() -> None:
    """The first generation starts once all workers that are wished are there."""
    table = Table()
    assert table.join(0) == []
    assert table.join(1) == [Prepare(1, 0, 1)]


def test_starts_with_fewer_after_a_window() -> None:
    """When the minimum is there, the rest is waited for a short while only."""
    table = Table(wished=3)
    table.join(0, 1)
    assert table.wait(gang.GATHER_S - 0.1) == []
    assert kinds(table.wait(0.2)) == [Prepare]


def test_never_starts_below_the_minimum() -> None:
    """Fewer workers than the minimum never train, and the wait for more ends with NO_GANG."""
    table = Table(replace(RULES, min_workers=2))
    table.join(0)
    assert table.wait(RULES.start_within_s - 1) == []
    assert [o.code for o in table.wait(1) if isinstance(o, End)] == [ExitCode.NO_GANG]


def test_ranks_follow_worker_numbers() -> None:
    """Ranks are dealt in the order of worker numbers, whatever order they came in."""
    table = Table(wished=3)
    table.join(2, 0)
    table.join(1)
    seats = {o.seat.worker: o.seat.first_rank for o in table.prepared() if isinstance(o, StartSeat)}
    assert seats == {0: 0, 1: 1, 2: 2}


def test_several_ranks_a_worker() -> None:
    """A worker's ranks are consecutive, and the world is all of them."""
    table = Table()
    table.join(0, 1, nproc=2)
    orders = [o for o in table.prepared() if isinstance(o, StartSeat)]
    assert [list(order.seat.ranks) for order in orders] == [[0, 1], [2, 3]]
    assert {order.world_size for order in orders} == {4}


def test_no_more_than_the_maximum() -> None:
    """Workers beyond the maximum stand by and make no generation end."""
    table = Table(replace(RULES, max_workers=2), wished=2)
    table.run(0, 1)
    assert table.join(2) == []
    assert table.wait(60) == []


def test_failed_preparation_is_tried_again() -> None:
    """Storage that refuses the fence delays the generation, it does not end the gang."""
    table = Table()
    table.join(0, 1)
    assert table.feed(Unprepared(1, "the disk is full")) == []
    assert kinds(table.wait(1.1)) == [Prepare]


def test_answers_to_an_old_preparation_are_ignored() -> None:
    """A worker lost while the fence is raised makes what was prepared void."""
    table = Table()
    table.join(0, 1)
    assert table.feed(Lost(1)) == []
    assert table.feed(Prepared(1, 1, 29500)) == []


def test_unfit_worker_ends_a_gang_that_never_ran() -> None:
    """A failed setup is told to all, so nobody waits for that worker."""
    table = Table()
    table.join(0)
    ends = table.join(1, unfit="setup failed with exit code 3")
    assert [(o.code, o.reason) for o in ends if isinstance(o, End)] == [
        (ExitCode.SETUP_FAILED, "worker 1: setup failed with exit code 3")
    ]


def test_unfit_replacement_is_sent_away_alone() -> None:
    """A replacement whose setup failed does not disturb those that train."""
    table = Table()
    table.run(0, 1)
    assert [o.code for o in table.join(2, unfit="no") if isinstance(o, DismissWorker)] == [80]
    assert table.state.phase is Phase.RUNNING


# ---------------------------------------------------------------------------------------- failures


def test_success_when_all_ranks_end_well() -> None:
    """The gang has succeeded when every rank ended with 0, not before."""
    table = Table()
    table.run(0, 1)
    table.beat(0, {"0": 5})
    assert table.exits(0) == []
    assert [o.code for o in table.exits(1) if isinstance(o, End)] == [0]
    assert "no_steps" not in table.story


def test_success_without_evidence_is_said_aloud() -> None:
    """A script that took no step and formed no group is told apart from one that trained."""
    table = Table()
    table.run(0, 1)
    table.exits(0)
    table.exits(1)
    assert "no_steps" in table.story
    assert "took no step" in table.state.detail


def test_formed_group_is_evidence() -> None:
    """A script without steps that formed a process group did work."""
    table = Table()
    table.run(0, 1)
    table.exits(0, formed_group=True)
    table.exits(1)
    assert "no_steps" not in table.story


def test_failure_kills_all_and_forms_anew() -> None:
    """A failing rank ends its generation at once; the next one forms as soon as all are gone."""
    table = Table()
    table.run(0, 1)
    assert table.exits(1, 3, error="ValueError: x")[0] == KillRanks(0, 1)
    assert kinds(table.killed(0)) == [Prepare]
    (first, *_) = [o for o in table.prepared() if isinstance(o, StartSeat)]
    assert (first.generation, first.restart_count) == (2, 1)


def test_error_budget() -> None:
    """Failures beyond the budget end the gang with the failing rank's own code."""
    table = Table(replace(RULES, error_budget=2))
    table.join(0, 1)
    for number in range(3):
        table.prepared()
        table.exits(1, 3, error=f"ValueError: {number}")
        ends = table.killed(0)
    assert [o.code for o in ends if isinstance(o, End)] == [3]
    assert table.state.errors_used == 3
    assert table.state.detail == "rank 1 failed: ValueError: 2; all 2 retries are used"


def test_code_is_said_once() -> None:
    """The last word on a failure without a message leaves the code to those that show it beside."""
    table = Table(replace(RULES, error_budget=0))
    table.run(0, 1)
    table.exits(1, 3)
    table.killed(0)
    assert (table.state.outcome, table.state.detail) == (3, "rank 1 failed: no error message")
    failed = next(e for e in table.state.chronicle.events if e.name == "rank_failed")
    assert failed.text == "rank 1 failed: exit code 3"


def test_same_failure_stops_early() -> None:
    """The same error at the same step three times in a row is not tried a fourth time."""
    table = Table(replace(RULES, error_budget=100))
    table.join(0, 1)
    for _ in range(3):
        table.prepared()
        table.exits(1, 1, error="ValueError: x", step=7)
        ends = table.killed(0)
    assert kinds(ends) == [End]
    assert "same_failure" in table.story


def test_kills_are_never_the_same_failure() -> None:
    """A rank that somebody kills again and again uses its budget, and is not given up early."""
    table = Table(replace(RULES, error_budget=100))
    table.join(0, 1)
    for _ in range(5):
        table.prepared()
        table.exits(1, -9)
        assert kinds(table.killed(0)) == [Prepare]


def test_command_that_cannot_start() -> None:
    """A command that does not exist is not tried again."""
    table = Table()
    table.run(0, 1)
    table.exits(1, 127, unstartable=True, error="no such file: trian.py")
    assert [o.code for o in table.killed(0) if isinstance(o, End)] == [ExitCode.SETUP_FAILED]


def test_victim_is_not_blamed() -> None:
    """The rank whose peer vanished is heard of first; the one that raised is blamed."""
    table = Table()
    table.run(0, 1)
    table.exits(0, 1, error="RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1")
    table.exits(1, -9, killed=True, error="ValueError: bad batch")
    failed = next(e for e in table.state.chronicle.events if e.name == "rank_failed")
    assert (failed.rank, failed.text) == (1, "rank 1 failed: ValueError: bad batch")


def test_lost_worker_costs_no_error() -> None:
    """Ranks that fail because a worker was lost are not errors of the script."""
    table = Table()
    table.run(0, 1)
    table.exits(0, 1, error="RuntimeError: Connection reset by peer")
    assert kinds(table.feed(Lost(1))) == [Prepare]
    assert (table.state.errors_used, table.state.restarts) == (0, 1)


def test_waits_for_a_replacement() -> None:
    """Below the minimum the gang waits; a worker with a new number completes it."""
    table = Table(replace(RULES, min_workers=2))
    table.run(0, 1)
    table.feed(Lost(1))
    assert table.killed(0) == []
    assert kinds(table.join(2)) == [Prepare]


def test_deaf_worker_is_dropped() -> None:
    """A worker that does not get rid of its ranks does not hold the others up for long."""
    table = Table()
    table.run(0, 1)
    table.exits(0, 3)
    assert kinds(table.wait(gang.CLEAR_S)) == [Drop, Prepare]


def test_hang_names_the_rank_behind() -> None:
    """No step for too long: the rank that is behind is named and the generation is replaced."""
    table = Table(replace(RULES, no_step_for_s=5))
    table.run(0, 1)
    table.beat(0, {"0": 42})
    table.beat(1, {"1": 41})
    assert table.wait(5) == [KillRanks(0, 1, dump=True), KillRanks(1, 1, dump=True)]
    assert kinds(table.killed(0, 1)) == [Prepare]
    hang = next(e for e in table.state.chronicle.events if e.name == "hang")
    assert (hang.rank, hang.worker) == (1, 1)
    assert hang.text == "rank 1 is behind: its last step is 41, the others' 42; no step for 5 s"


def test_hang_names_the_rank_that_stands_still() -> None:
    """Of ranks at the same step, the one is named that stood in code of its own while others
    waited."""
    table = Table(replace(RULES, no_step_for_s=5))
    table.run(0, 1)
    table.beat(0, {"0": 42})
    table.beat(1, {"1": 42})
    table.wait(5)
    table.exits(0, -6, killed=True, stands_in="train (train.py:9)", waits=True)
    table.exits(1, -6, killed=True, stands_in="load (train.py:12)")
    hang = next(e for e in table.state.chronicle.events if e.name == "hang")
    assert hang.rank == 1
    assert hang.text == (
        "rank 1 is behind: it stands in load (train.py:12), the others wait since step 42"
    )


def test_hang_that_nobody_explains() -> None:
    """Where neither steps nor stacks tell the ranks apart, none is named."""
    table = Table(replace(RULES, no_step_for_s=5))
    table.run(0, 1)
    table.beat(0, {"0": 42})
    table.beat(1, {"1": 42})
    table.wait(5)
    table.killed(0, 1)
    hang = next(e for e in table.state.chronicle.events if e.name == "hang")
    assert (hang.rank, hang.text) == (None, "no step for 5 s: all ranks stopped after step 42")


def test_slow_start_is_no_hang() -> None:
    """However long the start took: the first step that is heard of gives all ranks their time."""
    table = Table(replace(RULES, no_step_for_s=5))
    table.run(0, 1)
    table.wait(30)
    table.beat(0, {"0": 1})
    assert table.wait(4.9) == []
    assert kinds(table.wait(0.2)) == [KillRanks, KillRanks]


def test_steps_that_are_taken_again_are_no_hang() -> None:
    """Ranks that went back to a checkpoint move, however far they were before."""
    table = Table(replace(RULES, no_step_for_s=5))
    table.run(0, 1)
    for steps in (42, 11, 12):
        table.beat(0, {"0": steps})
        table.beat(1, {"1": steps})
        assert table.wait(4.9) == []
    assert table.state.progress.step == 12


def test_hang_budget() -> None:
    """Hangs beyond their own budget end the gang with HANG."""
    table = Table(replace(RULES, no_step_for_s=5, hang_budget=0))
    table.run(0, 1)
    table.beat(0, {"0": 1})
    table.wait(5)
    assert [o.code for o in table.killed(0, 1) if isinstance(o, End)] == [ExitCode.HANG]


def test_silent_script_is_no_hang() -> None:
    """A script that reports no steps at all is not watched."""
    table = Table(replace(RULES, no_step_for_s=5))
    table.run(0, 1)
    assert table.wait(10_000) == []


def test_first_step_that_never_comes() -> None:
    """Ranks that opened their step files have `start_within` for the first step, whatever else is
    watched; after it, no limit applies that was not asked for."""
    table = Table(replace(RULES, hang_budget=0))
    table.run(0, 1)
    table.beat(0, {"0": 0})
    assert table.wait(RULES.start_within_s - 1) == []
    assert kinds(table.wait(1)) == [KillRanks, KillRanks]
    ends = table.killed(0, 1)
    assert [o.code for o in ends if isinstance(o, End)] == [ExitCode.HANG]
    assert table.state.detail == "no step for 60 s: no rank took one"


def test_only_the_first_step_is_watched_unasked() -> None:
    """Without `no_step_for`, a script that took a step may take as long as it likes."""
    table = Table()
    table.run(0, 1)
    table.beat(0, {"0": 1})
    assert table.wait(10_000) == []


def test_later_generation_is_expected_to_step() -> None:
    """A script that took steps before is watched though its ranks opened no step file yet."""
    table = Table()
    table.run(0, 1)
    table.beat(0, {"0": 1})
    table.exits(1, 3)
    table.killed(0)
    table.prepared()
    assert kinds(table.wait(RULES.start_within_s)) == [KillRanks, KillRanks]


# ---------------------------------------------------------------------- leaving, joining, deadline


def test_joiner_drains_first() -> None:
    """A worker that joins waits for a checkpoint at a step boundary; then all form anew."""
    table = Table(wished=2)
    table.run(0, 1)
    table.wished = 3
    assert table.join(2) == [DrainRanks(0, 1), DrainRanks(1, 1)]
    table.exits(0, ExitCode.PAUSED)
    assert kinds(table.exits(1, ExitCode.PAUSED)) == [Prepare]
    assert len([o for o in table.prepared() if isinstance(o, StartSeat)]) == 3


def test_joiners_come_together() -> None:
    """Of two workers that are wished, the first to join waits a little for the second."""
    table = Table(wished=1)
    table.run(0)
    table.wished = 3
    assert table.join(1) == []
    assert kinds(table.join(2)) == [DrainRanks]


def test_leaver_goes_others_stay() -> None:
    """A worker that leaves goes after the drain; the others settle and form without it."""
    table = Table()
    table.run(0, 1)
    assert kinds(table.leave(1)) == [DrainRanks, DrainRanks]
    table.exits(0, ExitCode.PAUSED)
    assert [(o.worker, o.code) for o in table.exits(1, 75) if isinstance(o, DismissWorker)] == [
        (1, ExitCode.PAUSED)
    ]
    assert kinds(table.wait(gang.SETTLE_S)) == [Prepare]


def test_pause_of_all_forms_nothing() -> None:
    """Leaves that arrive one after another end the gang as paused, without a generation."""
    table = Table()
    table.run(0, 1)
    table.leave(1)
    table.exits(0, -15)
    table.exits(1, -15)
    table.now += gang.SETTLE_S / 2
    assert [o.code for o in table.leave(0) if isinstance(o, End)] == [ExitCode.PAUSED]
    assert table.state.generation == 1


def test_pause_names_the_checkpoint() -> None:
    """What is said of a pause names the newest checkpoint."""
    table = Table(wished=1)
    table.run(0)
    table.beat(0, {"0": 12}, window(12, 100))
    entry = CheckpointEntry("step-000012.g0001", 12, 1, 1, 1, 0.0, 1000)
    table.leave(0)
    table.feed(Committed(entry))
    table.exits(0, 75)
    assert table.state.detail == "left as asked; newest checkpoint: step 12"
    table.feed(Committed(entry))
    assert table.story.count("checkpoint") == 1


def test_leader_resigns_when_others_stay() -> None:
    """A leader that leaves drains first, then hands over to those that stay."""
    table = Table()
    table.run(0, 1)
    table.leave(0)
    table.exits(0, 75)
    table.exits(1, 75)
    assert kinds(table.wait(gang.SETTLE_S)) == [Resign]


def test_drain_is_enforced() -> None:
    """Ranks that ignore SIGTERM are killed when the grace is over."""
    table = Table()
    table.run(0, 1)
    table.leave(0, 1)
    assert kinds(table.wait(RULES.grace_s)) == [KillRanks, KillRanks]
    assert [o.code for o in table.killed(0, 1) if isinstance(o, End)] == [ExitCode.PAUSED]


def test_kill_by_the_agent_is_told() -> None:
    """Ranks that their own agents killed after the grace did not leave well: it is told once, and
    what is lost is said."""
    table = Table()
    table.run(0, 1)
    table.beat(0, {"0": 451}, window(451, 1000))
    table.feed(Committed(CheckpointEntry("step-000400.g0001", 400, 1, 1, 1, 0.0, 1000)))
    table.leave(0, 1)
    table.exits(0, -9, killed=True, late=True)
    table.exits(1, -9, killed=True, late=True)
    assert table.story.count("grace_over") == 1
    assert table.state.outcome == ExitCode.PAUSED
    assert table.state.detail == (
        "left as asked, killed after the grace; 51 steps since step 400 are lost"
    )


def test_late_rank_is_told_of_among_failures() -> None:
    """A peer that fails first, because the late rank is gone, does not hide that it was late."""
    table = Table()
    table.run(0, 1)
    table.leave(0, 1)
    table.exits(0, 1, error="RuntimeError: Connection closed by peer")
    table.exits(1, -9, killed=True, late=True)
    assert "grace_over" in table.story
    assert table.state.detail == "left as asked, killed after the grace, before the first step"


def test_failure_while_draining_is_not_counted() -> None:
    """A rank that fails on its way out holds nobody up and uses no budget."""
    table = Table()
    table.run(0, 1)
    table.leave(1)
    assert table.exits(1, 1, error="RuntimeError: x") != []
    table.killed(0)
    assert table.state.errors_used == 0
    assert kinds(table.wait(gang.SETTLE_S)) == [Prepare]


def test_finished_while_draining() -> None:
    """Ranks that took their last step just when they were asked to leave have succeeded."""
    table = Table(wished=1)
    table.run(0)
    table.beat(0, {"0": 100}, window(100, 100))
    table.leave(0)
    assert [o.code for o in table.exits(0) if isinstance(o, End)] == [0]


def test_obedient_exit_is_no_success() -> None:
    """A script that answers SIGTERM with exit code 0 in mid-course was paused, not finished."""
    table = Table(wished=1)
    table.run(0)
    table.beat(0, {"0": 40}, window(40, 100))
    table.leave(0)
    assert [o.code for o in table.exits(0) if isinstance(o, End)] == [ExitCode.PAUSED]


def test_deadline_ends_with_a_checkpoint() -> None:
    """The longest duration ends in a drain and MAX_DURATION."""
    table = Table(replace(RULES, train_until=1100.0))
    table.run(0, 1)
    assert kinds(table.wait(100)) == [DrainRanks, DrainRanks]
    table.exits(0, 75)
    ends = table.exits(1, 75)
    assert [o.code for o in ends if isinstance(o, End)] == [ExitCode.MAX_DURATION]


def test_unasked_pause_counts_as_failure() -> None:
    """Ranks that pause by themselves are let finish, formed anew, and cannot do so for ever."""
    table = Table(replace(RULES, error_budget=1))
    table.join(0, 1)
    for _ in range(2):
        table.prepared()
        table.feed(Said(0, RankExited(table.state.generation, 0, 75)))
        table.feed(Said(0, RanksGone(table.state.generation)))
        ends = table.exits(1, 75)
    assert [o.code for o in ends if isinstance(o, End)] == [1]


# ------------------------------------------------------------------------------- random histories


@dataclass
class Cluster:
    """Workers with ranks that obey, fail, vanish and ignore, around one leader; virtual time."""

    random: random.Random
    rules: Rules
    table: Table = field(init=False)
    ranks: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    """Worker → generation and ranks that run there."""
    started: dict[int, list[int]] = field(default_factory=dict)
    """Generation → ranks that were ever started in it."""
    queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    workers: set[int] = field(default_factory=set)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    tick: itertools.count[int] = field(default_factory=itertools.count)
    over: bool = False

    def __post_init__(self) -> None:
        self.table = Table(self.rules, wished=2)
        self.arrive()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self.queue.append((self.table.now + seconds, next(self.tick), call))

    def advance(self, until: float) -> None:
        """Everything that is due up to then, in order, ticks included."""
        while True:
            deadline = gang.next_deadline(self.table.state, self.table.now)
            timed = [(deadline, -1, lambda: self.feed(Tick()))] if deadline is not None else []
            due = min([*self.queue, *timed], key=lambda entry: entry[:2], default=None)
            if due is None or due[0] > until or self.over:
                self.table.now = max(self.table.now, until)
                return
            if due in self.queue:
                self.queue.remove(due)
            self.table.now = max(self.table.now, due[0])
            due[2]()

    def feed(self, given: Input) -> None:
        if self.over:
            return
        for output in self.table.feed(given):
            self.obey(output)

    def obey(self, output: Output) -> None:
        match output:
            case Prepare(ticket, _, at_least):
                answer = Prepared(ticket, at_least + self.random.randrange(3), 1)
                self.later(self.random.random(), lambda: self.feed(answer))
            case StartSeat():
                self.start(output)
            case DrainRanks(worker, generation):
                if self.random.random() < 0.9:  # the others ignore SIGTERM
                    self.later(self.random.random() * 3, lambda: self.end(worker, generation, 75))
            case KillRanks(worker, generation):
                self.later(0.01, lambda: self.end(worker, generation, -9, killed=True))
            case DismissWorker(worker):
                assert worker not in self.ranks, "a worker is sent away with its ranks running"
                self.workers.discard(worker)
            case Drop(worker):
                self.vanish(worker)
            case End() | Resign():
                assert not self.ranks, "ranks run on after the end"
                self.over = True

    def start(self, order: StartSeat) -> None:
        generation, ranks = order.generation, list(order.seat.ranks)
        assert order.seat.worker not in self.ranks, "two generations on one worker"
        assert all(g == generation for g, _ in self.ranks.values()), "two generations at once"
        assert generation >= max(self.started, default=0), "generations must grow"
        known = self.started.setdefault(generation, [])
        assert not set(ranks) & set(known), "a rank exists twice in a generation"
        known += ranks
        assert order.world_size <= self.rules.max_workers
        assert len(known) <= order.world_size
        if order.seat.worker in self.workers:
            self.ranks[order.seat.worker] = (generation, ranks)

    def end(self, worker: int, generation: int, code: int, *, killed: bool = False) -> None:
        if self.ranks.get(worker, (None,))[0] != generation:
            return
        _, ranks = self.ranks.pop(worker)
        for rank in ranks:
            self.feed(Said(worker, RankExited(generation, rank, code, killed=killed)))
        self.feed(Said(worker, RanksGone(generation)))

    # ---- what may happen to a cluster

    def arrive(self) -> None:
        worker = next(self.numbers)
        if worker and len(self.workers) > 5:
            return
        self.workers.add(worker)
        self.feed(Said(worker, Hello(worker, "h", 1, self.random.randint(1, 4))))

    def vanish(self, worker: int) -> None:
        self.workers.discard(worker)
        self.ranks.pop(worker, None)
        self.feed(Lost(worker))

    def lose_one(self) -> None:
        others = sorted(self.workers - {0})
        if others:
            self.vanish(self.random.choice(others))

    def leave_one(self) -> None:
        if self.workers:
            self.feed(Said(self.random.choice(sorted(self.workers)), Leaving()))

    def fail_one(self) -> None:
        if self.ranks:
            worker = self.random.choice(sorted(self.ranks))
            self.end(worker, self.ranks[worker][0], self.random.choice([1, -9, 3, 75]))

    def step_all(self) -> None:
        for worker, (generation, ranks) in list(self.ranks.items()):
            step = self.random.randrange(5) + generation * 5
            self.feed(Said(worker, Beat(generation, {str(r): step for r in ranks}, reporting=True)))


@pytest.mark.parametrize("seed", range(150))
def test_random_histories(seed: int) -> None:
    """Whatever happens in whatever order: one generation at a time, no rank twice, growing numbers,
    budgets respected, and after all were asked to leave the gang ends."""
    rng = random.Random(seed)
    rules = replace(
        RULES,
        min_workers=rng.randint(1, 2),
        error_budget=rng.randint(0, 3),
        no_step_for_s=rng.choice([None, 8.0]),
        train_until=rng.choice([None, None, 1100.0]),
    )
    cluster = Cluster(rng, rules)
    happenings = [
        *[cluster.arrive] * 3,
        cluster.lose_one,
        cluster.leave_one,
        cluster.fail_one,
        *[cluster.step_all] * 4,
    ]
    for _ in range(rng.randint(1, 40)):
        cluster.advance(cluster.table.now + rng.expovariate(0.5))
        rng.choice(happenings)()
    for worker in list(cluster.workers):
        cluster.feed(Said(worker, Leaving()))
    cluster.advance(cluster.table.now + rules.start_within_s + 3 * rules.grace_s + gang.CLEAR_S)
    assert cluster.over
    assert not cluster.ranks
    state = cluster.table.state
    assert state.errors_used <= rules.error_budget + 1
    assert state.hangs_used <= rules.hang_budget + 1
    numbers = [event.seq for event in state.chronicle.events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
