"""``dtp-tui --demo``: the real engine and controller on a simulated cluster that has been busy.

Time is virtual: `PAST` is played at once, then it goes on at the pace of the clock on the wall.
Everything can be paused, resumed, scaled and stopped; nothing of it is real, and nothing is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dtp_engine.backend import Machine
from dtp_engine.backends import LEDGER_FILE, Parts, job_storage_uri
from dtp_engine.clock import VirtualClock
from dtp_engine.controller import Controller
from dtp_engine.driver import Driver
from dtp_engine.engine import Engine, job_id_of
from dtp_engine.jobs import (
    AttemptId,
    CheckpointPolicy,
    JobSpec,
    NodeRange,
    Request,
    RequestKind,
    Resources,
    RetryPolicy,
)
from dtp_engine.lease import LeaseKeeper
from dtp_engine.ledger import Ledger
from dtp_engine.local.ledger import LocalLedger
from dtp_engine.settings import Settings
from dtp_engine.simulated.backend import SimulatedBackend
from dtp_engine.simulated.cluster import GIB, Cluster
from dtp_engine.simulated.curves import Behaviour
from dtp_trainer import wire
from dtp_trainer.storage import open_storage

PAST = timedelta(minutes=14)
SWEEP_S = 2.0
"""Between two looks of the controller while the past is played."""
LIVE_S = 0.25
HOLDER = "demo:1:0"
ACTOR = "you@demo"


@dataclass(frozen=True, slots=True)
class Part:
    """One job of the scenario."""

    name: str
    at_s: float
    """When it is submitted, from the beginning of the past."""
    workers: int
    behaviour: Behaviour
    most: int = 4
    gpus: int = 2
    args: str = ""


SCENARIO = (
    Part("digits", 0, 1, Behaviour(steps=1200, step_s=0.2, global_batch=64), gpus=1),
    Part("unet-segment", 20, 2, Behaviour(step_s=0.9, always_fails_at=120, seed=5), gpus=1),
    Part(
        "llama-350m",
        40,
        4,
        Behaviour(30_000, 0.62, 128, 4000, tokens_per_sample=1024, fails_at=(900,), seed=1),
        most=8,
    ),
    Part("resnet50", 70, 2, Behaviour(16_000, 0.5, 512, 2500, seed=2)),
    Part("bert-large", 100, 2, Behaviour(9_000, 0.55, 256, 3000, seed=3)),
    Part("vit-sweep", 500, 4, Behaviour(6_000, 0.4, 256, 1500, seed=4), gpus=4),
)
MACHINES = tuple(
    Machine(f"gpu-{n}", 48, 192 * GIB, 4, "L40S", price_usd_per_hour=3.2) for n in range(4)
)


@dataclass(frozen=True, slots=True)
class Moment:
    at_s: float
    happen: Callable[[Demo], Awaitable[None]]


MOMENTS = (
    Moment(330, lambda demo: demo.request("bert-large", RequestKind.PAUSE)),
    Moment(420, lambda demo: demo.request("resnet50", RequestKind.SCALE, workers=1)),
    Moment(560, lambda demo: demo.take_back("llama-350m", worker=3)),
    Moment(600, lambda demo: demo.request("resnet50", RequestKind.SCALE, workers=2)),
)


class DemoEngine(Engine):
    """An `Engine` that is driven by its own process."""

    def __init__(self, settings: Settings, parts: Parts, demo: Demo) -> None:
        super().__init__(settings, parts, demo.clock)
        self._demo = demo

    async def ensure_driver(self) -> None:
        """The demo drives for as long as it is open."""

    async def driver(self) -> Driver:
        log = self.settings.home / "controller.log"
        return Driver(HOLDER, alive=True, beat_at=self._clock.now(), log=log)

    async def aclose(self) -> None:
        await self._demo.stop()
        await super().aclose()
        self._demo.folder.cleanup()


class Demo:
    """The cluster, its controller, and what happens to them."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="dtp-demo-", ignore_cleanup_errors=True)
        self.home = Path(self.folder.name)
        self.clock = VirtualClock(datetime.now(UTC) - PAST)
        behaviours = {part.name: part.behaviour for part in SCENARIO}
        self.cluster = Cluster(self.clock, MACHINES, behaviours=behaviours)
        self.backend = SimulatedBackend(self.cluster)
        self._began = self.clock.now().timestamp()
        self._ledger: Ledger | None = None
        self._engine: DemoEngine | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> Engine:
        """Play the past, and go on in the background."""
        self._ledger = await LocalLedger.open(self.home / LEDGER_FILE)
        settings = Settings(self.home, ACTOR, backend="simulated")
        self._engine = DemoEngine(settings, Parts(self._ledger, self.backend), self)
        keeper = LeaseKeeper(self._ledger, self.clock, HOLDER, ttl_s=settings.lease_ttl_s)
        controller = Controller(self._ledger, self.backend, self.clock, keeper)
        await self._play_past(controller)
        self._write_status()
        self._task = asyncio.create_task(self._live(controller), name="demo")
        return self._engine

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def request(self, name: str, kind: RequestKind, *, workers: int | None = None) -> None:
        """As a client would, without waiting for the answer."""
        if self._ledger is not None:
            key = f"{name}/{kind}/{self.clock.now()}"
            job_id = job_id_of(name)
            at = self.clock.now()
            await self._ledger.request(Request(key, kind, job_id, ACTOR, at, workers))

    async def take_back(self, name: str, *, worker: int) -> None:
        """The machine below one of its workers is wanted back."""
        self.cluster.take_back(AttemptId(job_id_of(name), 1), worker)

    async def _play_past(self, controller: Controller) -> None:
        due = sorted([*MOMENTS, *map(_submission, SCENARIO)], key=lambda moment: moment.at_s)
        while (elapsed := self.clock.now().timestamp() - self._began) < PAST.total_seconds():
            while due and due[0].at_s <= elapsed:
                await due.pop(0).happen(self)
            await controller.sweep()
            await self.clock.advance(SWEEP_S)

    async def submit(self, part: Part) -> None:
        if self._engine is not None:
            await self._engine.submit(_spec(part), key=part.name)
            await self.request(part.name, RequestKind.SCALE, workers=part.workers)

    async def _live(self, controller: Controller) -> None:
        behind = datetime.now(UTC) - self.clock.now()
        while True:
            await controller.sweep()
            self._write_status()
            await asyncio.sleep(LIVE_S)
            due = datetime.now(UTC) - behind - self.clock.now()
            await self.clock.advance(due.total_seconds())

    def _write_status(self) -> None:
        """What real gangs keep in the storage of their job."""
        for attempt in list(self.cluster.gangs):
            storage = open_storage(job_storage_uri(self.home, attempt.job_id))
            gang = self.backend.status(attempt)
            if gang is not None:
                storage.write(wire.GANG_KEY, wire.encode_object(gang))
            head = self.cluster.memory(attempt.job_id).head()
            storage.write(wire.HEAD_KEY, wire.encode_object(head))


def _submission(part: Part) -> Moment:
    return Moment(part.at_s, lambda demo: demo.submit(part))


def _spec(part: Part) -> JobSpec:
    return JobSpec(
        part.name,
        f"python train.py --model {part.name}",
        nodes=NodeRange(1, part.most),
        nproc_per_node=part.gpus,
        resources=Resources(part.gpus, 4.0 * part.gpus, 24 * GIB * part.gpus),
        checkpoint=CheckpointPolicy(every=timedelta(seconds=60), keep=5),
        retry=RetryPolicy(on_errors=2),
        tags={"team": "demo"},
    )
