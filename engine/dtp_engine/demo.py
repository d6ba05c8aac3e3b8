"""An engine on a simulated cluster with some history behind it: `dtp-tui --demo`.

Nothing is started and nothing is kept: the ledger is in memory, the job storage in a temporary
folder, and the controller a task of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from dtp_engine.backend import Gang, Machine
from dtp_engine.backends import Parts
from dtp_engine.controller import Controller
from dtp_engine.driver import holder_name
from dtp_engine.engine import Engine, job_id_of
from dtp_engine.jobs import (
    AttemptId,
    CheckpointPolicy,
    Intent,
    Job,
    JobSpec,
    JobState,
    NodeRange,
    Request,
    RequestKind,
    Resources,
    RetryPolicy,
)
from dtp_engine.lease import LeaseKeeper
from dtp_engine.local.ledger import LocalLedger
from dtp_engine.settings import Settings
from dtp_engine.simulated.backend import SimulatedBackend
from dtp_engine.simulated.cluster import GIB, Cluster, Faults
from dtp_engine.simulated.curves import Behaviour
from dtp_trainer import wire

HISTORY_S = 1200.0
STEP_S = 5.0
"""The history is played in steps of so many seconds."""
MACHINES = tuple(
    Machine(f"g5-{n}", 8, 32 * GIB, 1, "NVIDIA A10G", price_usd_per_hour=0.42) for n in range(8)
)
FAULTS = Faults(crashes_per_hour=1.0, spot_losses_per_hour=2.0)


class LateClock:
    """Real time, a little behind; `skip` catches up."""

    def __init__(self, behind_s: float) -> None:
        self._behind_s = behind_s

    def now(self) -> datetime:
        return datetime.now(UTC) - timedelta(seconds=self._behind_s)

    def monotonic(self) -> float:
        return time.monotonic() - self._behind_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def skip(self, seconds: float) -> None:
        self._behind_s = max(self._behind_s - seconds, 0.0)


class StoredBackend(SimulatedBackend):
    """Writes what real gangs write to job storage, for those who read it there."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        super().__init__(cluster)
        self._jobs = home / "storage" / "jobs"
        self._speaks = False

    async def observe(self, attempts: Sequence[AttemptId]) -> Mapping[AttemptId, Gang]:
        gangs = await super().observe(attempts)
        if self._speaks:
            for attempt in attempts:
                self._store(attempt)
        return gangs

    def speak(self) -> None:
        """Write where every gang is, and from now on what changes."""
        self._speaks = True
        for attempt in self._cluster.gangs:
            self._store(attempt)

    def _store(self, attempt: AttemptId) -> None:
        status = self.status(attempt)
        if status is not None:
            folder = self._jobs / attempt.job_id
            head = self._cluster.memory(attempt.job_id).head()
            _replace(folder / wire.GANG_KEY, wire.encode_object(status))
            _replace(folder / wire.HEAD_KEY, wire.encode_object(head))


@dataclass(frozen=True, slots=True)
class Act:
    """A job of the demo, and what its owner did with it."""

    spec: JobSpec
    behaviour: Behaviour
    owner: str
    at_s: float = 0.0
    """When it was submitted, in the history."""
    workers: int | None = None
    paused_at_s: float | None = None


def _act(name: str, nodes: str, behaviour: Behaviour, owner: str, **about: float) -> Act:
    low, _, high = nodes.partition("..")
    spec = JobSpec(
        name=name,
        run=f"python {name.split('-', maxsplit=1)[0]}.py",
        nodes=NodeRange(int(low), int(high or low)),
        resources=Resources(gpus=1, cpus=4, memory_bytes=16 * GIB),
        checkpoint=CheckpointPolicy(every=timedelta(minutes=1)),
        retry=RetryPolicy(on_errors=2),
    )
    workers = about.pop("workers", None)
    return Act(spec, behaviour, owner, workers=None if workers is None else int(workers), **about)


ACTS = (
    _act("digits-baseline", "1", Behaviour(1800, 0.15, 48, 30, seed=11), "ana@laptop"),
    _act(
        "gpt-small",
        "2..4",
        Behaviour(40_000, 0.22, 64, 5_000, tokens_per_sample=1024, seed=1),
        "ana@laptop",
        workers=3,
    ),
    _act("resnet50-food", "1..2", Behaviour(9_000, 0.5, 256, 300, seed=2), "ben@gpu-box", at_s=60),
    _act(
        "whisper-tiny",
        "1",
        Behaviour(4_000, 0.6, 32, 500, fails_at=(150,), seed=3),
        "ben@gpu-box",
        at_s=120,
        paused_at_s=700,
    ),
    _act("clip-broken", "1", Behaviour(5_000, always_fails_at=90, seed=4), "cleo@ci", at_s=200),
    _act("plain-script", "1", Behaviour(6_000, 0.5, reports_steps=False), "cleo@ci", at_s=300),
    _act("llama-lora", "6", Behaviour(20_000, 1.5, 16, 4_000, seed=5), "cleo@ci", at_s=900),
)


class DemoEngine(Engine):
    """Closing it ends the simulated world."""

    def __init__(self, settings: Settings, parts: Parts, clock: LateClock) -> None:
        super().__init__(settings, parts, clock)
        self._stopping = asyncio.Event()
        self._driving: asyncio.Task[None] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    async def begin(cls, actor: str) -> Self:
        """Plays the history first; about a second."""
        folder = tempfile.TemporaryDirectory(prefix="dtp-demo-")
        home = Path(folder.name)
        clock = LateClock(HISTORY_S)
        behaviours = {act.spec.name: act.behaviour for act in ACTS}
        cluster = Cluster(clock, MACHINES, faults=FAULTS, behaviours=behaviours, boot_s=8, seed=7)
        backend = StoredBackend(cluster, home)
        parts = Parts(await LocalLedger.open(":memory:"), backend)
        engine = cls(Settings(home=home, actor=actor, backend="simulated"), parts, clock)
        engine._folder = folder
        keeper = LeaseKeeper(parts.ledger, clock, holder_name(os.getpid()), ttl_s=60)
        controller = Controller(parts.ledger, backend, clock, keeper)
        await _play_history(parts, controller, clock)
        backend.speak()
        engine._driving = asyncio.create_task(
            controller.drive(engine._stopping, idle_s=float("inf"))
        )
        return engine

    async def aclose(self) -> None:
        self._stopping.set()
        if self._driving is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._driving
        await super().aclose()
        if self._folder is not None:
            self._folder.cleanup()


async def _play_history(parts: Parts, controller: Controller, clock: LateClock) -> None:
    passed = 0.0
    while passed < HISTORY_S:
        for act in ACTS:
            if passed <= act.at_s < passed + STEP_S:
                await _submit(parts, act, clock)
            if act.paused_at_s is not None and passed <= act.paused_at_s < passed + STEP_S:
                await parts.ledger.request(_request(RequestKind.PAUSE, act, clock))
        await controller.sweep()
        clock.skip(STEP_S)
        passed += STEP_S


async def _submit(parts: Parts, act: Act, clock: LateClock) -> None:
    job = Job(
        id=job_id_of(act.spec.name),
        name=act.spec.name,
        spec=act.spec,
        state=JobState.QUEUED,
        intent=Intent.RUN,
        workers=act.workers or act.spec.nodes.max,
        created_at=clock.now(),
        created_by=act.owner,
    )
    await parts.ledger.request(_request(RequestKind.SUBMIT, act, clock), job=job)


def _request(kind: RequestKind, act: Act, clock: LateClock) -> Request:
    key = f"demo-{kind}-{act.spec.name}"
    return Request(key, kind, job_id_of(act.spec.name), act.owner, clock.now())


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.replace(path)
