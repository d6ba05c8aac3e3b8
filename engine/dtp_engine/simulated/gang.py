"""The workers of one simulated attempt: they come up, form generations, train, leave and die.

Everything happens at its own time, however seldom somebody looks: `advance` plays all that is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, assert_never

from dtp_engine.backend import LaunchPlan, Liveness, WorkerSight
from dtp_engine.jobs import Reason
from dtp_engine.simulated import curves
from dtp_engine.simulated.curves import Behaviour
from dtp_engine.simulated.memory import JobMemory
from dtp_engine.simulated.timeline import NEVER, Segment, Timeline
from dtp_trainer import wire
from dtp_trainer.wire import ExitCode, GangPhase

FORM_S = 0.5
GATHER_S = 3.0
DRAIN_S = 1.0
LEAVE_S = 0.2
NOTICE_S = 120.0
"""From a spot notice until the machine is gone."""
CHECKPOINT_BYTES = 84_000_000
KILLED = 137

Due: TypeAlias = tuple[float, Callable[[float], None]]
"""When, and what then happens."""


@dataclass(slots=True)
class Worker:
    number: int
    host: str
    launched_at: float
    up_at: float
    stop_takes_s: float = 0.0
    """Beyond the time that a checkpoint takes; `NEVER` for one that ignores being asked."""
    up: bool = False
    asked_at: float | None = None
    dismissed: bool = False
    gone_at: float = NEVER
    """When it leaves or is killed, as far as that is known yet."""
    notice_at: float = NEVER
    """When the platform says that it will take the machine back."""
    code: int | None = None
    reason: Reason | None = None
    exited: bool = False

    def leave(self, at: float, code: int | None) -> None:
        self.dismissed = True
        leaves_at = at + (self.stop_takes_s if self.asked_at is not None else 0.0)
        if leaves_at < self.gone_at:
            self.gone_at, self.code = leaves_at, code

    def sight(self) -> WorkerSight:
        if not self.exited:
            return WorkerSight(Liveness.ALIVE, host=self.host)
        return WorkerSight(Liveness.EXITED, self.code, self.reason, host=self.host)


@dataclass(slots=True)
class GangFacts:
    """All that is to be known of a gang; what readers get."""

    plan: LaunchPlan
    """The newest."""
    behaviour: Behaviour
    memory: JobMemory
    since: float
    """When it began to wait for workers."""
    workers: dict[int, Worker] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)
    phase: GangPhase = GangPhase.FORMING
    term: int = 0
    leader: int | None = None
    form_at: float = NEVER
    drained_at: float = NEVER
    checkpoint_at: float = NEVER
    restarts: int = 0
    errors_used: int = 0
    hangs_used: int = 0
    outcome: int | None = None
    detail: str = ""
    updated: float = 0.0

    @property
    def members(self) -> list[Worker]:
        return [w for w in self.workers.values() if w.up and not w.exited]

    @property
    def ready(self) -> list[Worker]:
        return [w for w in self.members if w.asked_at is None]

    def step_at(self, at: float) -> int:
        """Completed steps of the job."""
        current = self.timeline.current
        if current is None:
            return self.memory.step
        return min(current.step_at(at), self.behaviour.steps)

    @property
    def world_size(self) -> int:
        last = self.timeline.last
        return self.ranks(len(last.workers)) if last else 0

    def ranks(self, workers: int) -> int:
        return workers * self.plan.spec.nproc_per_node


@dataclass(slots=True)
class SimulatedGang(GangFacts):
    """A gang that lives: told to do things, and doing what is due."""

    # ---------------------------------------------------------------------- what is done to it

    def ask_to_leave(self, number: int, at: float) -> None:
        worker = self.workers[number]
        if worker.exited or worker.asked_at is not None:
            return
        worker.asked_at = at
        if not worker.up or self.phase is GangPhase.ENDED:
            worker.leave(at + LEAVE_S, ExitCode.PAUSED)
        elif self.phase is GangPhase.RUNNING:
            self._drain(at, DRAIN_S)
        elif self.phase is GangPhase.FORMING:
            self._drain(at, LEAVE_S)

    def kill(self, number: int, at: float) -> None:
        worker = self.workers[number]
        if not worker.exited:
            worker.gone_at, worker.code = at, KILLED

    def fail_rank(self, at: float, error: str) -> None:
        """The gang answers by itself for as long as its budget for errors lasts."""
        if self.phase is not GangPhase.RUNNING:
            return
        text = f"rank 0 failed: {error}"
        self.memory.tell(at, "rank_failed", text, step=self.step_at(at))
        self.errors_used += 1
        if self.errors_used > self.plan.errors_left:
            self._end(at, ExitCode.FAILED, text)
        else:
            self._restart(at)

    def freeze(self, at: float) -> None:
        """No step is taken any more."""
        self.timeline.freeze(at)

    # ---------------------------------------------------------------------------- what is due

    def advance(self, now: float) -> None:
        while True:
            at, happen = min(self._due(), key=lambda due: due[0], default=(NEVER, _nothing))
            if at > now:
                break
            happen(at)
            self.updated = at
        if self.phase is not GangPhase.ENDED:
            self.updated = now

    def _due(self) -> Iterator[Due]:
        for worker in self.workers.values():
            if worker.exited:
                continue
            yield worker.gone_at, partial(self._exit, worker)
            yield worker.notice_at, partial(self._be_taken_back, worker)
            if not worker.up:
                yield worker.up_at, partial(self._join, worker)
        match self.phase:
            case GangPhase.FORMING:
                yield self.form_at, self._form
                if self.members:
                    limit = self.plan.spec.watchdog.start_within.total_seconds()
                    yield self.since + limit, self._give_up
            case GangPhase.RUNNING:
                yield from self._due_while_running()
            case GangPhase.DRAINING:
                if self.members:
                    yield self.drained_at, self._leave_or_form
            case GangPhase.ENDED:
                pass
            case _:
                assert_never(self.phase)

    def _due_while_running(self) -> Iterator[Due]:
        current, script = self.timeline.current, self.behaviour
        assert current is not None
        yield self.checkpoint_at, self._save
        yield current.when(script.steps), self._succeed
        if self.plan.train_until is not None:
            yield self.plan.train_until.timestamp(), self._time_is_up
        for step in (*script.fails_at, *script.hangs_at):
            if step not in self.memory.met:
                yield current.when(step), partial(self._meet, step)
        if script.always_fails_at is not None:
            yield current.when(script.always_fails_at), self._fail_again
        if (patience := self.plan.spec.watchdog.no_step_for) is not None:
            yield current.stuck_at + patience.total_seconds(), self._notice_hang

    # -------------------------------------------------------------------------------- workers

    def _join(self, worker: Worker, at: float) -> None:
        worker.up = True
        if self.leader is None:
            self._elect(at)
        if self.phase is GangPhase.ENDED:
            worker.leave(at + LEAVE_S, self.outcome)
        elif self.phase is GangPhase.RUNNING:
            self.memory.tell(at, "worker_joined", f"worker {worker.number} joined")
            self._drain(at, DRAIN_S)
        elif self.phase is GangPhase.FORMING:
            self._gather(at)

    def _exit(self, worker: Worker, at: float) -> None:
        worker.exited = True
        if not worker.up or self.phase is GangPhase.ENDED:
            return
        if worker.number == self.leader:
            self._elect(at)
        current = self.timeline.current
        if current is not None and worker.number in current.workers:
            self.memory.tell(at, "worker_lost", f"worker {worker.number} is lost")
            self._restart(at)
        elif self.phase is GangPhase.FORMING:
            self._gather(at)

    def _be_taken_back(self, worker: Worker, at: float) -> None:
        worker.notice_at = NEVER
        self.ask_to_leave(worker.number, at)
        worker.reason = Reason.SPOT_INTERRUPTION
        if worker.gone_at > at + NOTICE_S:
            self.kill(worker.number, at + NOTICE_S)

    def _elect(self, at: float) -> None:
        numbers = [worker.number for worker in self.members]
        if numbers:
            self.leader = self.memory.leader = min(numbers)
            self.term += 1
            self.memory.tell(at, "leader_elected", f"worker {self.leader} leads")

    # ---------------------------------------------------------------------------- generations

    def _gather(self, at: float) -> None:
        """Form at once with all that are wished, a little later with as many as must be."""
        if len(self.ready) >= self.plan.wished:
            self.form_at = at + FORM_S
        elif len(self.ready) >= self.plan.spec.nodes.min:
            self.form_at = max(at, self.since + GATHER_S) + FORM_S
        else:
            self.form_at = NEVER

    def _form(self, at: float) -> None:
        workers = tuple(sorted(worker.number for worker in self.ready))
        self.phase, self.form_at = GangPhase.RUNNING, NEVER
        self.memory.generation += 1
        number, step = self.memory.generation, self.memory.step
        step_s = curves.seconds_a_step(self.behaviour, self.ranks(len(workers)))
        self.timeline.begin(Segment(at, number, workers, step, step_s))
        self._plan_checkpoint(at)
        text = f"generation {number}: {len(workers)} workers, from step {step}"
        self.memory.tell(at, "generation_started", text, step=step)

    def _drain(self, at: float, takes_s: float) -> None:
        self.phase = GangPhase.DRAINING
        self.drained_at = at + takes_s

    def _leave_or_form(self, at: float) -> None:
        """All ranks have checkpointed; who was asked to leave does, and the rest goes on."""
        self._save(at)
        self.timeline.close(at)
        for worker in self.members:
            if worker.asked_at is not None and not worker.dismissed:
                worker.leave(at + LEAVE_S, ExitCode.PAUSED)
        if self.ready:
            self._begin_to_gather(at)
        else:
            saved = f"newest checkpoint: step {self.memory.step}"
            self._end(at, ExitCode.PAUSED, f"left as asked; {saved}")

    def _restart(self, at: float) -> None:
        """What was done since the last checkpoint is lost."""
        self.restarts += 1
        self.timeline.close(at)
        self._begin_to_gather(at)

    def _begin_to_gather(self, at: float) -> None:
        self.phase, self.since = GangPhase.FORMING, at
        if any(w.asked_at is not None and not w.dismissed for w in self.members):
            self._drain(at, LEAVE_S)
        else:
            self._gather(at)

    def _plan_checkpoint(self, at: float) -> None:
        every = self.plan.spec.checkpoint.every
        self.checkpoint_at = at + every.total_seconds() if every else NEVER

    def _save(self, at: float) -> None:
        step = self.step_at(at)
        self._plan_checkpoint(at)
        if not self.behaviour.reports_steps or step <= self.memory.step:
            return
        entry = wire.CheckpointEntry(
            name=wire.checkpoint_name(step, self.memory.generation),
            step=step,
            generation=self.memory.generation,
            attempt=self.plan.attempt.number,
            world_size=self.world_size,
            at=at,
            bytes=CHECKPOINT_BYTES,
            values=curves.values(self.behaviour, step),
        )
        self.memory.commit(entry, keep=self.plan.spec.checkpoint.keep)

    # ----------------------------------------------------------------------------------- ends

    def _succeed(self, at: float) -> None:
        self._save(at)
        self._end(at, ExitCode.SUCCEEDED, f"finished after {self.behaviour.steps} steps")

    def _time_is_up(self, at: float) -> None:
        self._save(at)
        self._end(at, ExitCode.MAX_DURATION, "trained for as long as it may")

    def _give_up(self, at: float) -> None:
        self._end(at, ExitCode.NO_GANG, "too few workers came in time")

    def _meet(self, step: int, at: float) -> None:
        """A step at which the script fails or hangs, once."""
        self.memory.met.add(step)
        if step in self.behaviour.hangs_at:
            self.freeze(at)
        else:
            self.fail_rank(at, "RuntimeError: CUDA error: an illegal memory access was encountered")

    def _fail_again(self, at: float) -> None:
        self.fail_rank(at, "ValueError: Expected input batch_size (64) to match target (63)")

    def _notice_hang(self, at: float) -> None:
        text = "no step for too long; rank 0 is behind"
        self.memory.tell(at, "hang", text, step=self.step_at(at))
        self.hangs_used += 1
        if self.hangs_used > self.plan.hangs_left:
            self._end(at, ExitCode.HANG, text)
        else:
            self._restart(at)

    def _end(self, at: float, code: int, detail: str) -> None:
        self.timeline.close(at)
        self.phase, self.outcome, self.detail = GangPhase.ENDED, int(code), detail
        self.memory.tell(at, "gang_ended", detail, step=self.memory.step)
        for worker in self.members:
            worker.leave(at + LEAVE_S, int(code))


def _nothing(_: float) -> None:
    pass
