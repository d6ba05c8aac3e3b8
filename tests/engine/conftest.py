"""Backends as their contract sees them: the same few orders to a worker, whatever the platform."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtp_engine.backend import Gang, LaunchPlan, Liveness, LogLine, WorkerSight
from dtp_engine.clock import VirtualClock
from dtp_engine.jobs import AttemptId, JobSpec, NodeRange, Resources
from dtp_engine.local.backend import LocalBackend
from dtp_engine.local.folders import Home, WorkerFolder
from dtp_engine.settings import Settings
from dtp_engine.simulated.backend import SimulatedBackend
from dtp_engine.simulated.cluster import Cluster, Faults

STANDIN = (sys.executable, "-S", str(Path(__file__).with_name("standin_agent.py")))
WITHIN_S = 20.0
"""Far longer than anything here takes; only a broken promise waits for it."""


ONE = AttemptId("digits", 1)


def plan_of(
    workers: Sequence[int],
    attempt: AttemptId,
    *,
    env: Mapping[str, str] | None = None,
    cpus: float,
    **spec: Any,
) -> LaunchPlan:
    job = JobSpec(
        name="digits",
        run="python train.py",
        nodes=NodeRange(1, 4),
        resources=Resources(cpus=cpus, memory_bytes=2**20),
        env=env or {},
        **spec,
    )
    return LaunchPlan(attempt, "digits", job, tuple(workers), len(workers), "secret", 3, 2)


def has_exited(worker: int, gang: Gang) -> bool:
    seen = gang.workers.get(worker)
    return seen is not None and seen.liveness is Liveness.EXITED


class LocalHarness:
    """The local backend with stand-ins for agents, in a state folder of its own."""

    def __init__(self, home: Path) -> None:
        self.path = home
        self.home = Home(home)
        self.backend = self.open()
        self._second = 0

    def open(self, agent: Sequence[str] = STANDIN) -> LocalBackend:
        """Another backend over the same state, as a second controller would have."""
        return LocalBackend(Settings(home=self.path, actor="test"), agent=agent)

    def plan(
        self,
        workers: Sequence[int] = (0,),
        *,
        attempt: AttemptId = ONE,
        env: Mapping[str, str] | None = None,
        cpus: float = 0.25,
        **spec: Any,
    ) -> LaunchPlan:
        return plan_of(workers, attempt, env=env, cpus=cpus, workdir=str(self.path), **spec)

    def folder(self, worker: int, attempt: AttemptId) -> WorkerFolder:
        return self.home.worker(attempt, worker)

    # -- what any harness can do

    async def look(self, attempt: AttemptId) -> Gang:
        return (await self.backend.observe([attempt]))[attempt]

    async def until(self, attempt: AttemptId, met: Callable[[Gang], bool]) -> Gang:
        """Let time pass until what is seen meets the condition."""
        deadline = time.monotonic() + WITHIN_S
        while not met(gang := await self.look(attempt)):
            assert time.monotonic() < deadline, f"still {gang}"
            await asyncio.sleep(0.01)
        return gang

    async def until_exited(self, attempt: AttemptId, worker: int = 0) -> WorkerSight:
        return (await self.until(attempt, partial(has_exited, worker))).workers[worker]

    async def until_running(self, attempt: AttemptId, worker: int = 0) -> None:
        """Beyond the launch: the worker can be told things."""
        claim = self.folder(worker, attempt).claim
        await self.until(attempt, lambda _: claim.exists() and claim.read_bytes() != b"")

    async def finish_worker(self, attempt: AttemptId, worker: int, code: int) -> None:
        await self.order(attempt, worker, exit=code)

    async def kill_worker(self, attempt: AttemptId, worker: int) -> None:
        os.kill(self.pid(attempt, worker), signal.SIGKILL)

    async def talk(self, attempt: AttemptId) -> None:
        said = [f"2026-11-23T08:30:{self._second + n:02}.000000Z [rank0] {n}" for n in range(3)]
        self._second += 3
        for folder in self.home.workers(attempt):
            await self._say(attempt, folder, said)

    async def _say(self, attempt: AttemptId, folder: WorkerFolder, lines: list[str]) -> None:
        wanted = folder.log.stat().st_size + len("".join(lines)) + len(lines)
        await self.order(attempt, folder.worker, say=lines)
        await self.until(attempt, lambda _: folder.log.stat().st_size >= wanted)

    async def read(
        self, attempt: AttemptId, after: Mapping[int, str] | None = None
    ) -> list[LogLine]:
        return [line async for line in self.backend.logs(attempt, after=after)]

    # -- what only this one can

    def pid(self, attempt: AttemptId, worker: int = 0) -> int:
        return int(json.loads(self.folder(worker, attempt).claim.read_bytes())["pid"])

    async def order(self, attempt: AttemptId, worker: int = 0, **order: object) -> None:
        await self.until_running(attempt, worker)
        path = self.folder(worker, attempt).path / "order"
        await self.until(attempt, lambda _: not path.exists())
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(order))
        draft.replace(path)

    def processes(self) -> list[psutil.Process]:
        """All that carry this state folder's name."""
        found = []
        for process in psutil.process_iter():
            try:
                named = str(self.path) in process.environ().get("DTP_LAUNCH", "")
                if named and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    async def aclose(self) -> None:
        """Kill what the test left running, and see that nothing remains."""
        for folder in list(self.home.all_workers()):
            job_id, _, number = folder.path.parent.name.rpartition(".a")
            attempt = AttemptId(job_id, int(number))
            await self.backend.stop(attempt, [folder.worker], grace=timedelta(0))
            await self.until_exited(attempt, folder.worker)
        await self.backend.aclose()
        assert self.processes() == []


class SimulatedHarness:
    """The simulated cluster, on virtual time that passes only while a test waits."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.cluster = Cluster(self.clock)
        self.backend = SimulatedBackend(self.cluster)

    def plan(
        self,
        workers: Sequence[int] = (0,),
        *,
        attempt: AttemptId = ONE,
        env: Mapping[str, str] | None = None,
        cpus: float = 0.25,
    ) -> LaunchPlan:
        self.cluster.faults = Faults(deaf=1.0 if "STUBBORN" in (env or {}) else 0.0)
        return plan_of(workers, attempt, cpus=cpus)

    async def look(self, attempt: AttemptId) -> Gang:
        return (await self.backend.observe([attempt]))[attempt]

    async def until(self, attempt: AttemptId, met: Callable[[Gang], bool]) -> Gang:
        for _ in range(10_000):
            if met(gang := await self.look(attempt)):
                return gang
            await asyncio.sleep(0)  # what a test started meanwhile may begin to wait
            await self.clock.advance(0.25)
        pytest.fail(f"still {gang}")

    async def until_exited(self, attempt: AttemptId, worker: int = 0) -> WorkerSight:
        return (await self.until(attempt, partial(has_exited, worker))).workers[worker]

    async def until_running(self, attempt: AttemptId, worker: int = 0) -> None:
        await self.until(attempt, lambda _: self.cluster.gangs[attempt].workers[worker].up)

    async def finish_worker(self, attempt: AttemptId, worker: int, code: int) -> None:
        self.cluster.gangs[attempt].workers[worker].leave(self.cluster.now, code)

    async def kill_worker(self, attempt: AttemptId, worker: int) -> None:
        self.cluster.kill_worker(attempt, worker)

    async def talk(self, attempt: AttemptId) -> None:
        """Every worker reports its machine each second."""
        await self.clock.advance(4)

    async def read(
        self, attempt: AttemptId, after: Mapping[int, str] | None = None
    ) -> list[LogLine]:
        return [line async for line in self.backend.logs(attempt, after=after)]


@pytest.fixture
def simulated() -> SimulatedHarness:
    return SimulatedHarness()


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalHarness]:
    harness = LocalHarness(tmp_path / "home")
    yield harness
    await harness.aclose()
