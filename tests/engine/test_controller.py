"""The loop that drives: its lease, its sweeps, and what it survives, mostly on virtual time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest

from dtp_engine.backend import LaunchPlan, Machine
from dtp_engine.clock import VirtualClock
from dtp_engine.controller import PID_FILE, REPEAT_AFTER_S, Controller
from dtp_engine.driver import is_alive
from dtp_engine.errors import LeaseLost, Unreachable
from dtp_engine.jobs import (
    AttemptId,
    Event,
    Intent,
    Job,
    JobSpec,
    JobState,
    NodeRange,
    Request,
    RequestKind,
)
from dtp_engine.lease import LeaseKeeper
from dtp_engine.local.ledger import LocalLedger
from dtp_engine.simulated.backend import SimulatedBackend
from dtp_engine.simulated.cluster import GIB, Cluster
from dtp_engine.simulated.curves import Behaviour

TTL_S = 20.0
SPEC = JobSpec(name="digits", run="python train.py", nodes=NodeRange(1, 4))
HERE = Machine("here", cpus=4, memory_bytes=16 * GIB, gpus=0)


class Recorder(SimulatedBackend):
    """The simulated backend, with a list of what was launched and stopped, and planned trouble."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.launched: list[tuple[int, ...]] = []
        self.stopped: list[tuple[int, ...]] = []
        self.trouble: dict[str, Exception] = {}
        """Job → what its launch raises."""
        self.loses_calls = False

    async def launch(self, plan: LaunchPlan) -> None:
        self.launched.append(plan.workers)
        if plan.job_name in self.trouble:
            raise self.trouble[plan.job_name]
        if not self.loses_calls:
            await super().launch(plan)

    async def stop(self, attempt: AttemptId, workers: Sequence[int], *, grace: timedelta) -> None:
        self.stopped.append(tuple(workers))
        await super().stop(attempt, workers, grace=grace)


@dataclass
class World:
    ledger: LocalLedger
    clock: VirtualClock
    cluster: Cluster
    backend: Recorder
    controller: Controller
    dead: set[str] = field(default_factory=set)
    asked: int = 0

    def rival(self, name: str = "here:2:0") -> Controller:
        keeper = LeaseKeeper(
            self.ledger,
            self.clock,
            name,
            ttl_s=TTL_S,
            liveness=lambda holder: False if holder in self.dead else None,
        )
        return Controller(self.ledger, self.backend, self.clock, keeper)

    async def submit(self, name: str = "digits", workers: int = 2, **spec: object) -> None:
        chosen = replace(SPEC, name=name, **spec)  # type: ignore[arg-type]
        now = self.clock.now()
        job = Job(name, name, chosen, JobState.QUEUED, Intent.RUN, workers, now, "ana")
        await self.ledger.request(self._request(RequestKind.SUBMIT, name), job=job)

    async def ask(self, kind: RequestKind, name: str = "digits", **values: int) -> Request:
        return await self.ledger.request(replace(self._request(kind, name), **values))  # type: ignore[arg-type]

    def _request(self, kind: RequestKind, name: str) -> Request:
        self.asked += 1
        return Request(f"k{self.asked}", kind, name, "ana", self.clock.now())

    async def job(self, name: str = "digits") -> Job:
        found = await self.ledger.job(name)
        assert found is not None
        return found

    async def until(self, state: JobState, name: str = "digits", each_s: float = 0.5) -> Job:
        for _ in range(2000):
            await self.controller.sweep()
            job = await self.job(name)
            if job.state is state:
                return job
            await self.clock.advance(each_s)
        pytest.fail(f"{name} is {job.state} ({job.detail}), not {state}")

    async def events(self, name: str) -> list[Event]:
        return [e for e in await self.ledger.events() if e.name == name]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    clock = VirtualClock()
    ledger = await LocalLedger.open(":memory:")
    cluster = Cluster(clock, [HERE], behaviours={"digits": Behaviour(steps=1000, step_s=0.5)})
    backend = Recorder(cluster)
    keeper = LeaseKeeper(ledger, clock, "here:1:0", ttl_s=TTL_S, liveness=lambda _: None)
    yield World(ledger, clock, cluster, backend, Controller(ledger, backend, clock, keeper))
    await ledger.aclose()


# -------------------------------------------------------------------------------------- one job


async def test_job_is_driven_from_submission_to_success(world: World) -> None:
    """Its timeline explains it."""
    await world.submit()
    await world.until(JobState.SUCCEEDED)
    told = [event.text.partition(":")[0] for event in await world.events("state")]
    assert told == ["QUEUED → STARTING", "STARTING → RUNNING", "RUNNING → SUCCEEDED"]


async def test_pause_frees_the_machines_and_resume_goes_on_from_the_checkpoint(
    world: World,
) -> None:
    """The next attempt begins where the last one stopped."""
    await world.submit()
    await world.until(JobState.RUNNING)
    await world.clock.advance(3)
    await world.ask(RequestKind.PAUSE)
    await world.until(JobState.PAUSED)
    step = world.cluster.memory("digits").step
    assert not world.cluster.alive()
    await world.ask(RequestKind.RESUME)
    job = await world.until(JobState.RUNNING)
    assert (job.attempt, step > 0) == (2, True)
    assert world.cluster.gangs[AttemptId("digits", 2)].timeline.segments[0].step == step


async def test_scale_up_and_down_happens_inside_the_attempt(world: World) -> None:
    """Workers join and leave; the job runs on."""
    await world.submit(workers=2)
    await world.until(JobState.RUNNING)
    for wished in (4, 1):
        await world.ask(RequestKind.SCALE, workers=wished)
        for _ in range(20):
            await world.controller.sweep()
            await world.clock.advance(0.5)
        assert len(world.cluster.alive()) == wished
    assert (await world.job()).attempt == 1


async def test_refusal_is_answered_with_its_reason(world: World) -> None:
    """And changes nothing."""
    await world.submit()
    await world.until(JobState.RUNNING)
    asked = await world.ask(RequestKind.SCALE, workers=9)
    await world.controller.sweep()
    answer = await world.ledger.read_request(asked.key)
    assert answer is not None
    assert answer.refusal == "digits may have 1..4 workers, not 9; see `nodes` in its file"


async def test_sweep_without_news_writes_nothing(world: World) -> None:
    """A quiet cluster costs no disk."""
    await world.submit()
    await world.until(JobState.RUNNING)
    await world.controller.sweep()
    before = await world.job()
    revision = await world.ledger.revision()
    await world.controller.sweep()
    assert (await world.job(), await world.ledger.revision()) == (before, revision)


# ------------------------------------------------------------------------------------ several jobs


async def test_job_that_does_not_fit_waits_with_its_reason(world: World) -> None:
    """And starts when the first one made room."""
    world.cluster.behaviours = {"digits": Behaviour(steps=20, step_s=0.2)}
    await world.submit(workers=3)
    await world.until(JobState.RUNNING)
    await world.submit("second", workers=2, nodes=NodeRange(2, 2))
    waiting = await world.until(JobState.QUEUED, "second")
    assert waiting.detail == "needs 2 × 1 CPU, 1 free"  # noqa: RUF001
    await world.until(JobState.RUNNING, "second")


async def test_two_jobs_of_one_sweep_do_not_get_the_same_room(world: World) -> None:
    """What the first takes is not offered to the second, though nothing is launched yet."""
    await world.submit("one", workers=3, nodes=NodeRange(3, 3))
    await world.submit("two", workers=3, nodes=NodeRange(3, 3))
    await world.controller.sweep()
    states = [(await world.job(name)).state for name in ("one", "two")]
    assert states == [JobState.STARTING, JobState.QUEUED]


async def test_broken_job_does_not_stop_the_others(world: World) -> None:
    """It says so itself, once in its timeline."""
    world.backend.trouble["broken"] = ZeroDivisionError("oops")
    await world.submit("broken", workers=1)
    await world.submit("digits", workers=1)
    await world.until(JobState.RUNNING)
    job = await world.job("broken")
    assert "internal error: ZeroDivisionError('oops')" in job.detail
    assert len(await world.events("trouble")) == 1


async def test_launch_that_fails_is_tried_again_and_explained(world: World) -> None:
    """The detail goes when the trouble does."""
    world.backend.trouble["digits"] = Unreachable("no route to host")
    await world.submit()
    for _ in range(3):
        await world.controller.sweep()
    assert "no route to host" in (await world.job()).detail
    world.backend.trouble.clear()
    assert (await world.until(JobState.RUNNING)).detail == ""


# ---------------------------------------------------------------------------------- what gets lost


async def test_launch_that_got_lost_is_repeated(world: World) -> None:
    """Not in every sweep, but after a while."""
    world.backend.loses_calls = True
    await world.submit()
    for _ in range(3):
        await world.controller.sweep()
    assert world.backend.launched == [(0, 1)]
    world.backend.loses_calls = False
    await world.clock.advance(REPEAT_AFTER_S)
    await world.until(JobState.RUNNING)
    assert world.backend.launched == [(0, 1)] * 2


async def test_unreachable_backend_is_told_once_and_nothing_is_done(world: World) -> None:
    """The job keeps its state, amber with the time."""
    await world.submit()
    await world.until(JobState.RUNNING)
    world.cluster.be_unreachable(60)
    for _ in range(5):
        await world.controller.sweep()
        await world.clock.advance(1)
    job = await world.job()
    assert job.state is JobState.RUNNING
    assert job.detail.startswith("not seen since")
    assert job.detail.endswith("the simulated cluster does not answer")
    assert len(await world.events("unseen")) == 1
    assert world.backend.stopped == []


async def test_stop_goes_out_though_the_backend_was_unreachable_when_it_was_asked(
    world: World,
) -> None:
    """The record stands; the effect follows."""
    await world.submit()
    await world.until(JobState.RUNNING)
    world.cluster.be_unreachable(10)
    await world.ask(RequestKind.STOP)
    await world.controller.sweep()
    assert (await world.job()).state is JobState.STOPPING
    await world.until(JobState.CANCELLED)


# -------------------------------------------------------------------------------------- the lease


async def test_only_the_holder_of_the_lease_drives(world: World) -> None:
    """A rival is refused for as long as the lease moves."""
    await world.submit()
    await world.until(JobState.RUNNING)
    rival = world.rival()
    for _ in range(10):
        with pytest.raises(LeaseLost):
            await rival.sweep()
        await world.clock.advance(TTL_S / 2)
        await world.controller.sweep()


async def test_lease_that_does_not_move_is_taken_over(world: World) -> None:
    """Judged by the rival's own clock, from when it first saw it so."""
    await world.submit()
    await world.controller.sweep()
    await world.clock.advance(10 * TTL_S)
    rival = world.rival()
    with pytest.raises(LeaseLost):
        await rival.sweep()
    await world.clock.advance(TTL_S)
    assert await rival.sweep()
    with pytest.raises(LeaseLost):
        await world.controller.sweep()


async def test_lease_of_a_dead_process_is_taken_over_at_once(world: World) -> None:
    """Nobody waits for a process that is known to be gone."""
    await world.submit()
    await world.controller.sweep()
    world.dead.add("here:1:0")
    assert await world.rival().sweep()


async def test_controller_without_work_leaves_and_gives_the_lease_back(world: World) -> None:
    """After its idle time, not before."""
    driving = asyncio.create_task(world.controller.drive(asyncio.Event(), idle_s=30))
    await world.clock.advance(29)
    assert not driving.done()
    await world.clock.advance(2)
    await driving
    assert await world.ledger.lease() is None


async def test_controller_that_is_asked_to_leave_does_so_at_once(world: World) -> None:
    """The jobs train on; the next one finds the lease free."""
    stopping = asyncio.Event()
    driving = asyncio.create_task(world.controller.drive(stopping, idle_s=30))
    await world.submit()
    await world.clock.advance(5)
    assert (await world.job()).state is JobState.RUNNING
    stopping.set()
    await world.clock.advance(0.1)
    await driving
    assert await world.ledger.lease() is None
    assert len(world.cluster.alive()) == 2


async def test_request_wakes_the_controller(world: World) -> None:
    """A client is answered within a tenth of a second, also after a long silence."""
    driving = asyncio.create_task(world.controller.drive(asyncio.Event(), idle_s=300))
    await world.clock.advance(60)
    await world.submit()
    await world.clock.advance(0.1)
    assert not await world.ledger.pending()
    driving.cancel()


# ----------------------------------------------------------------------- the background process


def start(home: Path, *, idle: str = "5m") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "dtp_engine.controller"],
        env={**os.environ, "DTP_HOME": str(home), "DTP_CONTROLLER_IDLE": idle},
        stderr=subprocess.DEVNULL,
    )


def wait_for(met: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def drives(process: subprocess.Popen[bytes], home: Path) -> bool:
    file = home / PID_FILE
    return file.exists() and json.loads(file.read_text())["pid"] == process.pid


def test_second_controller_leaves_at_once(home: Path) -> None:
    """One drives; the pid file names it."""
    first = start(home)
    wait_for(lambda: drives(first, home))
    assert start(home).wait(timeout=30) == 0
    assert drives(first, home)
    first.terminate()
    assert first.wait(timeout=30) == 0
    assert not (home / PID_FILE).exists()


def test_controller_that_was_killed_is_replaced_at_once(home: Path) -> None:
    """`kill -9` leaves a lease of a dead process, which binds nobody."""
    first = start(home)
    wait_for(lambda: drives(first, home))
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=30)
    second = start(home)
    wait_for(lambda: drives(second, home))
    second.terminate()
    assert second.wait(timeout=30) == 0


def test_background_controller_leaves_when_nothing_is_active(home: Path) -> None:
    """After the idle time of its settings."""
    assert start(home, idle="0.2s").wait(timeout=30) == 0


def test_process_of_another_machine_is_neither_dead_nor_alive() -> None:
    """Only its lease can speak for it."""
    assert is_alive("elsewhere:1:0.00") is None
