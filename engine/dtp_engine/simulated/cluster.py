"""The simulated world: machines that come and go, workers on them, and what may go wrong.

It outlives every controller, as a real cluster does. Nothing in it is random but for the seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from dtp_engine.backend import Capacity, CapacityRequest, LaunchPlan, Machine
from dtp_engine.clock import Clock
from dtp_engine.jobs import AttemptId, Reason, Resources
from dtp_engine.simulated.curves import Behaviour
from dtp_engine.simulated.gang import KILLED, SimulatedGang, Worker
from dtp_engine.simulated.memory import JobMemory
from dtp_engine.simulated.timeline import NEVER

GIB = 1 << 30
HERE = Machine("sim-0", cpus=8, memory_bytes=32 * GIB, gpus=0)


@dataclass(frozen=True, slots=True)
class Pool:
    """Machines that come when capacity is asked for, one after the other."""

    machine: Machine
    most: int
    boot_s: float = 90.0
    apart_s: float = 20.0
    """Between the arrival of one and the next."""


@dataclass(frozen=True, slots=True)
class Faults:
    """How often things go wrong by themselves, a worker and an hour of its life."""

    crashes_per_hour: float = 0.0
    spot_losses_per_hour: float = 0.0
    never_start: float = 0.0
    """Share of the workers that are launched and do nothing."""
    slow_stops: float = 0.0
    """Share of the workers that take long to leave."""
    deaf: float = 0.0
    """Share of the workers that do not leave when they are asked to."""


@dataclass(slots=True)
class _Arrival:
    machine: Machine
    at: float


@dataclass(slots=True)
class Cluster:
    clock: Clock
    machines: Sequence[Machine] = (HERE,)
    pool: Pool | None = None
    faults: Faults = Faults()
    behaviours: Mapping[str, Behaviour] = field(default_factory=dict)
    """By the job's name."""
    boot_s: float = 2.0
    """From the launch of a worker until its agent is up."""
    seed: int = 0
    gangs: dict[AttemptId, SimulatedGang] = field(default_factory=dict)
    memories: dict[str, JobMemory] = field(default_factory=dict)
    unreachable_until: float = 0.0
    forbidden: set[tuple[AttemptId, int]] = field(default_factory=set)
    """Workers that were stopped before they were launched; they never will be."""
    hidden_until: dict[str, float] = field(default_factory=dict)
    """Machine → until when its workers cannot be observed."""
    _arrivals: list[_Arrival] = field(default_factory=list)

    @property
    def now(self) -> float:
        return self.clock.now().timestamp()

    @property
    def is_reachable(self) -> bool:
        return self.now >= self.unreachable_until

    @property
    def present(self) -> list[Machine]:
        arrived = [a.machine for a in self._arrivals if a.at <= self.now]
        return [*self.machines, *arrived]

    def advance(self) -> None:
        """Let everything happen that is due by now."""
        for gang in self.gangs.values():
            gang.advance(self.now)

    def alive(self) -> list[tuple[AttemptId, int]]:
        """Every worker that runs, as (attempt, number)."""
        self.advance()
        return [
            (attempt, worker.number)
            for attempt, gang in self.gangs.items()
            for worker in gang.workers.values()
            if not worker.exited
        ]

    # -------------------------------------------------------------------- what a backend asks for

    def provision(self, request: CapacityRequest) -> None:
        """Machines for so many more workers, as far as the pool goes. Twice is once."""
        if self.pool is None:
            return
        due = sum(arrival.at > self.now for arrival in self._arrivals)
        each = _how_many(_whole(self.pool.machine), request.resources)
        missing = min(
            -(-request.workers // each) - due if each else 0,
            self.pool.most - len(self._arrivals),
        )
        for number in range(max(missing, 0)):
            name = f"{self.pool.machine.name}-{len(self._arrivals)}"
            at = self.now + self.pool.boot_s + number * self.pool.apart_s
            self._arrivals.append(_Arrival(replace(self.pool.machine, name=name), at))

    def launch(self, plan: LaunchPlan) -> None:
        """What exists, existed or was stopped before it began is left alone."""
        gang = self._gang(plan)
        gang.advance(self.now)
        for number in plan.workers:
            if number not in gang.workers and (plan.attempt, number) not in self.forbidden:
                gang.workers[number] = self._new_worker(plan, number)

    def stop(self, attempt: AttemptId, workers: Sequence[int], *, kill: bool) -> None:
        gang = self.gangs.get(attempt)
        for number in workers:
            if gang is None or number not in gang.workers:
                self.forbidden.add((attempt, number))
            elif kill:
                gang.advance(self.now)
                gang.kill(number, self.now)
            else:
                gang.advance(self.now)
                gang.ask_to_leave(number, self.now)

    def capacity(self, at: datetime) -> Capacity:
        machines = self.present
        free = [self._free(machine) for machine in machines]
        biggest = [*machines, self.pool.machine] if self.pool else machines
        return Capacity(
            at=at,
            machines=tuple(machines),
            free_cpus=sum(r.cpus for r in free),
            free_memory_bytes=sum(r.memory_bytes or 0 for r in free),
            free_gpus=sum(r.gpus for r in free),
            largest=Resources(
                max((m.gpus for m in biggest), default=0),
                max((m.cpus for m in biggest), default=0.0),
                max((m.memory_bytes for m in biggest), default=0),
            ),
            can_grow=self.pool is not None and len(self._arrivals) < self.pool.most,
        )

    # ---------------------------------------------------------------------------- what goes wrong

    def kill_worker(self, attempt: AttemptId, number: int) -> None:
        """As ``kill -9`` of its agent."""
        self._played(attempt).kill(number, self.now)

    def take_back(self, attempt: AttemptId, number: int) -> None:
        """A spot interruption: the worker checkpoints and leaves, or is killed after the notice."""
        self._played(attempt).workers[number].notice_at = self.now

    def fail_rank(self, attempt: AttemptId, error: str) -> None:
        self._played(attempt).fail_rank(self.now, error)

    def freeze(self, attempt: AttemptId) -> None:
        """The ranks hang."""
        self._played(attempt).freeze(self.now)

    def be_unreachable(self, seconds: float) -> None:
        self.unreachable_until = self.now + seconds

    def hide(self, machine: str, seconds: float) -> None:
        """Workers of this machine are UNKNOWN for so long."""
        self.hidden_until[machine] = self.now + seconds

    # ------------------------------------------------------------------------------------- inside

    def memory(self, job_id: str) -> JobMemory:
        return self.memories.setdefault(job_id, JobMemory(job_id))

    def _played(self, attempt: AttemptId) -> SimulatedGang:
        gang = self.gangs[attempt]
        gang.advance(self.now)
        return gang

    def _gang(self, plan: LaunchPlan) -> SimulatedGang:
        gang = self.gangs.get(plan.attempt)
        if gang is None:
            memory = self.memory(plan.attempt.job_id)
            if plan.resume_from is not None:
                memory.choose(plan.resume_from)
            behaviour = self.behaviours.get(plan.job_name, Behaviour())
            gang = SimulatedGang(plan, behaviour, memory, since=self.now)
            self.gangs[plan.attempt] = gang
        gang.plan = plan
        return gang

    def _new_worker(self, plan: LaunchPlan, number: int) -> Worker:
        luck = random.Random(f"{self.seed}/{plan.attempt}/{number}")
        machine = self._find_room(plan.spec.resources)
        if machine is None:
            nowhere = Worker(number, "", self.now, NEVER, reason=Reason.NO_CAPACITY, exited=True)
            nowhere.gone_at = self.now
            return nowhere
        starts = luck.random() >= self.faults.never_start
        worker = Worker(number, machine.name, self.now, self.now + self.boot_s if starts else NEVER)
        worker.stop_takes_s = self._stop_takes_s(luck)
        worker.notice_at = self.now + _wait(luck, self.faults.spot_losses_per_hour)
        crash_at = self.now + _wait(luck, self.faults.crashes_per_hour)
        if crash_at < NEVER:
            worker.gone_at, worker.code = crash_at, KILLED
        return worker

    def _stop_takes_s(self, luck: random.Random) -> float:
        drawn = luck.random()
        if drawn < self.faults.deaf:
            return NEVER
        return luck.uniform(5, 60) if drawn < self.faults.deaf + self.faults.slow_stops else 0.0

    def _find_room(self, need: Resources) -> Machine | None:
        for machine in self.present:
            if _how_many(self._free(machine), need):
                return machine
        return None

    def _free(self, machine: Machine) -> Resources:
        held = [
            gang.plan.spec.resources
            for gang in self.gangs.values()
            for worker in gang.workers.values()
            if worker.host == machine.name and not worker.exited
        ]
        return Resources(
            machine.gpus - sum(r.gpus for r in held),
            machine.cpus - sum(r.cpus for r in held),
            machine.memory_bytes - sum(r.memory_bytes or 0 for r in held),
        )


def _how_many(free: Resources, need: Resources) -> int:
    """Workers that fit, as far as CPUs, GPUs and memory go."""
    fits = [
        (free.gpus, need.gpus),
        (free.cpus, need.cpus),
        (free.memory_bytes or 0, need.memory_bytes or 0),
    ]
    return int(min(((have + 1e-9) // each for have, each in fits if each), default=1_000))


def _whole(machine: Machine) -> Resources:
    return Resources(machine.gpus, machine.cpus, machine.memory_bytes)


def _wait(luck: random.Random, per_hour: float) -> float:
    """Seconds until it happens."""
    return luck.expovariate(per_hour / 3600) if per_hour else NEVER
