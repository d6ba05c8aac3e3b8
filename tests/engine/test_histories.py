"""Random histories of jobs, clients, faults and crashing controllers on virtual time.

Each history is a function of its seed. The real controller drives the simulated cluster through
the real ledger; between any two of its calls it may die, or be taken for dead and wake up later.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import pytest

from dtp_engine.backend import Backend, Machine
from dtp_engine.clock import VirtualClock
from dtp_engine.controller import Controller
from dtp_engine.errors import LeaseLost
from dtp_engine.jobs import (
    AttemptId,
    CheckpointPolicy,
    Event,
    Intent,
    Job,
    JobSpec,
    JobState,
    NodeRange,
    PlacementState,
    Reason,
    Request,
    RequestKind,
    RetryPolicy,
    Watchdog,
)
from dtp_engine.lease import LeaseKeeper
from dtp_engine.ledger import Ledger
from dtp_engine.local.ledger import LocalLedger
from dtp_engine.simulated.backend import SimulatedBackend
from dtp_engine.simulated.cluster import GIB, Cluster, Faults, Pool
from dtp_engine.simulated.curves import Behaviour

TTL_S = 20.0
STEPS = 50
CANCEL_WITHIN_S = 120.0
"""Grace, margin, the lease of a lost controller, and a few looks."""
LOST_CALLS = 0.05
"""Share of the launches and stops that the platform accepts and forgets."""
MACHINE = Machine("m", cpus=2, memory_bytes=8 * GIB, gpus=0)


class Crash(BaseException):
    """The controller dies here."""


@dataclass
class Fuse:
    """Blows at the n-th call: kills the controller there, or stops it until `gate` opens."""

    left: int
    sleeps: bool
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    blown: asyncio.Event = field(default_factory=asyncio.Event)

    async def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.blown.set()
            if not self.sleeps:
                raise Crash
            await self.gate.wait()


class Fused:
    """A ledger or backend whose caller may die before and after each call; some calls get lost."""

    def __init__(self, inner: object, fuse: Fuse, luck: random.Random) -> None:
        self._inner = inner
        self._fuse = fuse
        self._luck = luck

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._inner, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._fuse.burn()
            if name in ("launch", "stop") and self._luck.random() < LOST_CALLS:
                return None
            result = await method(*args, **kwargs)
            await self._fuse.burn()
            return result

        return call


class World:
    def __init__(self, seed: int, ledger: Ledger) -> None:
        self.luck = random.Random(seed)
        self.clock = VirtualClock()
        self.ledger = ledger
        self.cluster = self._cluster(seed)
        self.fuse = Fuse(0, sleeps=False)
        self.holders = itertools.count()
        self.dead: set[str] = set()
        self.holder = ""
        self.sleepers: list[tuple[Fuse, asyncio.Task[bool]]] = []
        self.controller = self._new_controller()
        self.ids = (f"j{number}" for number in itertools.count())
        self.keys = (f"k{number}" for number in itertools.count())

    def _cluster(self, seed: int) -> Cluster:
        luck = self.luck
        rate = luck.choice([0, 0, 20, 120])
        return Cluster(
            self.clock,
            machines=[replace(MACHINE, name=f"m{n}") for n in range(luck.choice([2, 2, 3]))],
            pool=luck.choice([None, None, Pool(MACHINE, most=2, boot_s=30)]),
            faults=Faults(
                crashes_per_hour=rate,
                spot_losses_per_hour=luck.choice([0, 0, 60]),
                never_start=luck.choice([0, 0, 0.1]),
                slow_stops=luck.choice([0, 0.2]),
                deaf=luck.choice([0, 0.1]),
            ),
            boot_s=luck.choice([0.5, 3.0]),
            seed=seed,
        )

    def _new_controller(self) -> Controller:
        self.holder = f"sim:{next(self.holders)}:0"
        ledger = cast(Ledger, Fused(self.ledger, self.fuse, self.luck))
        backend = cast(Backend, Fused(SimulatedBackend(self.cluster), self.fuse, self.luck))
        keeper = LeaseKeeper(ledger, self.clock, self.holder, ttl_s=TTL_S, liveness=self._liveness)
        return Controller(ledger, backend, self.clock, keeper)

    def _liveness(self, holder: str) -> bool | None:
        return False if holder in self.dead else None

    # ------------------------------------------------------------------------------ the controller

    async def sweep(self) -> None:
        """One sweep that may end anywhere."""
        luck = self.luck
        if luck.random() > 0.3:
            await self.calm_sweep()
            return
        self.fuse.left = luck.randrange(1, 40)
        self.fuse.sleeps = luck.random() < 0.3
        task = asyncio.create_task(self._sweep())
        blown = asyncio.create_task(self.fuse.blown.wait())
        await asyncio.wait({task, blown}, return_when=asyncio.FIRST_COMPLETED)
        blown.cancel()
        if not self.fuse.blown.is_set():
            await task
            return
        if self.fuse.sleeps:
            self.sleepers.append((self.fuse, task))
        else:
            await asyncio.wait({task})
            self.dead.add(self.holder)
        self.fuse = Fuse(0, sleeps=False)
        self.controller = self._new_controller()

    async def calm_sweep(self) -> None:
        self.fuse.left = 0
        await self._sweep()

    async def _sweep(self) -> bool:
        try:
            return await self.controller.sweep()
        except (LeaseLost, Crash):
            return False

    async def wake_sleeper(self) -> None:
        """A controller that was taken for dead goes on where it stood."""
        if self.sleepers:
            fuse, task = self.sleepers.pop(self.luck.randrange(len(self.sleepers)))
            fuse.gate.set()
            await task

    # --------------------------------------------------------------------------------- the clients

    async def submit(self) -> None:
        luck = self.luck
        low = luck.choice([1, 1, 2])
        name = next(self.ids)
        spec = JobSpec(
            name=name,
            run="python train.py",
            nodes=NodeRange(low, luck.choice([low, low + 1, 3])),
            checkpoint=CheckpointPolicy(every=timedelta(seconds=20)),
            retry=RetryPolicy(on_preemption=luck.choice([None, None, 1])),
            watchdog=Watchdog(timedelta(seconds=60), no_step_for=timedelta(seconds=20)),
            max_duration=luck.choice([None, None, None, timedelta(seconds=90)]),
            stop_grace=timedelta(seconds=luck.choice([5, 30])),
            priority=luck.choice([50, 50, 90]),
        )
        self.cluster.behaviours = {**self.cluster.behaviours, name: self._behaviour()}
        job = Job(
            id=name,
            name=name,
            spec=spec,
            state=JobState.QUEUED,
            intent=Intent.RUN,
            workers=luck.randint(spec.nodes.min, spec.nodes.max),
            created_at=self.clock.now(),
            created_by="ana",
        )
        await self.ledger.request(self._request(RequestKind.SUBMIT, name), job=job)

    def _behaviour(self) -> Behaviour:
        luck = self.luck
        return Behaviour(
            steps=luck.choice([20, 200, 1000]),
            step_s=luck.choice([0.1, 0.5]),
            fails_at=luck.choice([(), (), (7,), (7, 15)]),
            always_fails_at=luck.choice([None, None, None, 12]),
            hangs_at=luck.choice([(), (), (9,)]),
        )

    def _request(self, kind: RequestKind, job_id: str, workers: int | None = None) -> Request:
        return Request(next(self.keys), kind, job_id, "ana", self.clock.now(), workers)

    async def ask(self, kind: RequestKind) -> None:
        jobs = await self.ledger.jobs()
        if jobs:
            workers = self.luck.randint(1, 3) if kind is RequestKind.SCALE else None
            await self.ledger.request(self._request(kind, self.luck.choice(jobs).id, workers))

    # ---------------------------------------------------------------------------------- the faults

    async def go_wrong(self) -> None:
        luck, cluster = self.luck, self.cluster
        alive = cluster.alive()
        if not alive:
            return
        attempt, worker = luck.choice(alive)
        match luck.randrange(7):
            case 0 | 1:
                cluster.kill_worker(attempt, worker)
            case 2:
                for each in alive:
                    cluster.kill_worker(*each)
            case 3:
                cluster.take_back(attempt, worker)
            case 4:
                cluster.fail_rank(attempt, "ValueError")
            case 5:
                cluster.be_unreachable(luck.choice([1, 10, 60]))
            case _:
                cluster.hide(luck.choice(["m0", "m1"]), luck.choice([1, 10, 60]))

    async def happen(self) -> None:
        """One thing, and a little time."""
        kinds = list(RequestKind)[1:]
        match self.luck.randrange(10):
            case 0:
                await self.submit()
            case 1 | 2:
                await self.ask(self.luck.choice(kinds))
            case 3 | 4:
                await self.go_wrong()
            case 5:
                await self.wake_sleeper()
            case _:
                pass
        self.pass_time(self.luck.choice([0.0, 0.1, 0.5, 1, 3, 10, 30]))

    def pass_time(self, seconds: float) -> None:
        """Nobody sleeps in here, so nobody need be woken."""
        self.clock._now += timedelta(seconds=seconds)

    async def calm_down(self) -> None:
        """Nothing goes wrong any more that has not begun to."""
        while self.sleepers:
            await self.wake_sleeper()
        self.cluster.faults = Faults()
        self.cluster.unreachable_until = 0.0
        self.cluster.hidden_until = {}


# -------------------------------------------------------------------------------- what must hold


async def check(world: World) -> None:
    jobs = await world.ledger.jobs()
    alive = world.cluster.alive()
    for job in jobs:
        attempts = {attempt.number for attempt, _ in alive if attempt.job_id == job.id}
        assert len(attempts) <= 1, f"{job.id}: attempts {attempts} are alive at once"
        assert not (job.state.final and attempts), f"{job.id} is {job.state}, with workers"
        assert not (job.state is JobState.PAUSED and attempts), f"{job.id}: paused, with workers"
        staying = [
            worker
            for attempt, gang in world.cluster.gangs.items()
            for worker in gang.workers.values()
            if attempt.job_id == job.id and not worker.exited and worker.asked_at is None
        ]
        assert len(staying) <= job.spec.nodes.max, f"{job.id}: {len(staying)} workers"
    workers = [w for gang in world.cluster.gangs.values() for w in gang.workers.values()]
    crowded = [w for w in workers if w.reason is Reason.NO_CAPACITY]
    assert not crowded, "more workers than the machines hold"


async def placements(world: World) -> dict[AttemptId, dict[int, PlacementState]]:
    jobs = [job.id for job in await world.ledger.jobs()]
    attempts = await world.ledger.attempts(jobs)
    return {a.id: {p.worker: p.state for p in a.placements} for a in attempts}


async def check_unseen(world: World, before: Mapping[AttemptId, Mapping[int, Any]]) -> None:
    """What could not be observed was neither forgotten nor, unasked, stopped or replaced."""
    if world.cluster.is_reachable:
        return
    after = await placements(world)
    for job in await world.ledger.jobs():
        attempt = AttemptId(job.id, job.attempt)
        for worker, state in before.get(attempt, {}).items():
            now = after[attempt][worker]
            assert now is state or (now is PlacementState.STOPPING and job.intent is not Intent.RUN)
        assert attempt not in before or len(after[attempt]) == len(before[attempt])


async def check_records(world: World) -> None:
    """What is written down adds up: no event lost, none twice, no placement forgotten."""
    events = await world.ledger.events(limit=1_000_000)
    for job in await world.ledger.jobs():
        own = [event for event in events if event.job_id == job.id]
        _check_chain(job, own)
        _check_gang_events(world, job, own)
        for attempt in await world.ledger.attempts([job.id]):
            numbers = [placement.worker for placement in attempt.placements]
            assert len(set(numbers)) == len(numbers)
            gone = [p.state is PlacementState.GONE for p in attempt.placements]
            assert attempt.ended_at is None or all(gone)
            assert attempt.ended_at is not None or attempt.number == job.attempt


def _check_chain(job: Job, events: Sequence[Event]) -> None:
    """Each change of state begins where the one before it ended."""
    state = str(JobState.QUEUED)
    for event in events:
        if event.name == "state":
            before, after = event.text.partition(":")[0].split(" → ")
            assert before == state, f"{job.id}: {event.text} after {state}"
            state = after
    assert state == job.state, f"{job.id} is {job.state}; its events end at {state}"


def _check_gang_events(world: World, job: Job, events: Sequence[Event]) -> None:
    memory = world.cluster.memory(job.id)
    if memory.told > len(memory.events):
        return
    told = [e.text for e in memory.events if e.seq <= job.gang_events_seen]
    assert [e.text for e in events if e.actor == "gang"] == told, f"{job.id}: events of the gang"
    assert not job.state.final or job.gang_events_seen == memory.told, f"{job.id}: events lost"


async def play(seed: int) -> None:
    ledger = await LocalLedger.open(":memory:")
    world = World(seed, ledger)
    try:
        await world.submit()
        for _ in range(STEPS):
            await world.happen()
            before = await placements(world)
            await world.sweep()
            await check(world)
            await check_unseen(world, before)
        await check_records(world)
        await world.calm_down()
        if seed % 2:
            await _leave_alone(world)
        else:
            await _cancel_all(world)
        await check_records(world)
        assert not await ledger.pending(), "a request was never answered"
    except BaseException as error:
        error.add_note(f"history of seed {seed}")
        raise
    finally:
        await ledger.aclose()


async def _cancel_all(world: World) -> None:
    """After CANCEL every job is final within bounded time, and nothing of it runs."""
    for job in await world.ledger.jobs():
        if not job.state.final:
            kind = world.luck.choice([RequestKind.STOP, RequestKind.KILL])
            await world.ledger.request(world._request(kind, job.id))
    await _settle(world, within_s=CANCEL_WITHIN_S, each_s=2.0)
    jobs = await world.ledger.jobs()
    assert all(job.state.final for job in jobs), [(j.id, j.state, j.detail) for j in jobs]
    assert not world.cluster.alive()


async def _leave_alone(world: World) -> None:
    """Without further faults every job that shall run ends by itself, and pauses are kept."""
    await _settle(world, within_s=3 * 3600, each_s=20.0)
    jobs = await world.ledger.jobs()
    assert not any(job.active for job in jobs), [(j.id, j.state, j.detail) for j in jobs]
    assert not world.cluster.alive()


async def _settle(world: World, *, within_s: float, each_s: float) -> None:
    passed = 0.0
    while passed <= within_s and (
        await world.ledger.jobs(active_only=True) or await world.ledger.pending()
    ):
        await world.calm_sweep()
        await check(world)
        world.pass_time(each_s)
        passed += each_s


async def test_a_few_hundred_histories_keep_every_promise() -> None:
    """Whatever clients ask, machines do and controllers die of: nothing doubled, orphaned, lost."""
    for seed in range(300):
        await play(seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_five_thousand_histories_keep_every_promise() -> None:
    """The same promises, over many more seeds."""
    for seed in range(1000, 6000):
        await play(seed)
