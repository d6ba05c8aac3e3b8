"""The Backend of this machine: each worker is an agent in a process of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from dtp_engine import checkpoints
from dtp_engine.backend import Capacity, CapacityRequest, Cursor, Gang, LaunchPlan, LogLine, Since
from dtp_engine.backends import job_storage_uri
from dtp_engine.door import DeadlinePassed, Door
from dtp_engine.errors import InfrastructureError, Unreachable
from dtp_engine.jobs import AttemptId
from dtp_engine.launches import Place, launch_of
from dtp_engine.local import workers
from dtp_engine.local.folders import Home, WorkerFolder
from dtp_engine.local.logs import Feed
from dtp_engine.local.machine import read_hardware
from dtp_engine.local.processes import CHILDREN
from dtp_engine.local.secrets import read_secrets
from dtp_engine.local.slots import Slots
from dtp_engine.settings import Settings
from dtp_trainer import wire
from dtp_trainer.checkpoints import heads
from dtp_trainer.storage import StorageError, open_storage

T = TypeVar("T")

AGENT = (sys.executable, "-P", "-m", "dtp_trainer.agent")

_POLL_S = 0.05
_LINES_A_TURN = 500
_ANSWER_WITHIN_S = 30.0
_HOST = "127.0.0.1"


class LocalBackend:
    """Implements `dtp_engine.backend.Backend`.

    All it knows lies in ``DTP_HOME/workers``, so any process may go on where another one died.
    `agent` is the command of a worker's agent; tests put a program of their own there.
    """

    name = "local"

    def __init__(self, settings: Settings, *, agent: Sequence[str] = AGENT) -> None:
        self._settings = settings
        self._home = Home(settings.home.absolute())
        self._agent = tuple(agent)
        self._door = Door("dtp-local", deadline_s=_ANSWER_WITHIN_S)
        self._log_door = Door("dtp-logs", deadline_s=_ANSWER_WITHIN_S)
        self._slots: Slots | None = None

    async def provision(self, request: CapacityRequest) -> None:
        """This machine is as large as it is."""

    async def launch(self, plan: LaunchPlan) -> None:
        await self._through(self._door, lambda: self._launch(plan))

    async def observe(self, attempts: Sequence[AttemptId]) -> Mapping[AttemptId, Gang]:
        return await self._through(self._door, lambda: self._observe(attempts))

    async def stop(self, attempt: AttemptId, workers: Sequence[int], *, grace: timedelta) -> None:
        folders = [self._home.worker(attempt, number) for number in workers]
        await self._through(self._door, lambda: _stop(folders, grace.total_seconds()))

    async def logs(
        self,
        attempt: AttemptId,
        *,
        after: Cursor | None = None,
        since: Since | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogLine]:
        """In the order of time over all workers. With `follow` it goes on, through workers that
        join, until the caller closes it."""
        offsets = {worker: int(cursor) for worker, cursor in (after or {}).items()}
        feed = Feed(partial(self._home.workers, attempt), offsets, since)
        while True:
            lines = await self._through(self._log_door, partial(feed.read, _LINES_A_TURN))
            for line in lines:
                yield line
            if len(lines) == _LINES_A_TURN:
                continue
            if not follow:
                return
            await asyncio.sleep(_POLL_S)

    async def capacity(self) -> Capacity:
        return await self._through(self._door, lambda: self._find_slots().capacity())

    async def aclose(self) -> None:
        """Workers live on."""
        self._door.close()
        self._log_door.close()
        CHILDREN.reap()

    async def _through(self, door: Door, call: Callable[[], T]) -> T:
        try:
            return await door.run(call)
        except DeadlinePassed as error:
            raise Unreachable(f"{self._home.path} did not answer: {error}") from None
        except StorageError as error:
            raise Unreachable(str(error)) from error
        except OSError as error:
            where = error.filename or self._home.path
            raise Unreachable(f"cannot use {where}: {error.strerror or error}") from error

    # -- on the door's thread

    def _launch(self, plan: LaunchPlan) -> None:
        CHILDREN.reap()
        folders = [self._home.worker(plan.attempt, number) for number in plan.workers]
        try:
            self._choose_checkpoint(plan)
            secrets = read_secrets(self._home.path, plan.attempt.job_id, plan.spec)
        except (InfrastructureError, heads.UnknownCheckpoint) as error:
            for folder in folders:
                workers.refuse(folder, wire.ExitCode.SETUP_FAILED, str(error))
            return
        env = agent_environment(os.environ)
        for folder in folders:
            workers.begin(folder, self._launch_of(plan, folder, secrets), self._agent, env)

    def _choose_checkpoint(self, plan: LaunchPlan) -> None:
        """Before the first worker of the attempt begins: later the gang has gone on from there."""
        begun = any(f.spawned.exists() for f in self._home.workers(plan.attempt))
        if plan.resume_from is not None and not begun:
            heads.set_resume(open_storage(self._storage(plan.attempt)), str(plan.resume_from))

    def _launch_of(
        self, plan: LaunchPlan, folder: WorkerFolder, secrets: Mapping[str, str]
    ) -> wire.Launch:
        slots = self._find_slots()
        slot = slots.reserve(folder, plan.spec.resources)
        if slot is None:
            raise Unreachable(f"no free GPUs for worker {folder.worker} of {plan.attempt} yet")
        place = Place(
            worker=folder.worker,
            storage=self._storage(plan.attempt),
            scratch=str(folder.scratch),
            host=_HOST,
            zygotes=str(self._home.zygotes),
            zygote_idle_s=self._settings.zygote_idle_s,
            env={**slots.environment(slot), **secrets},
        )
        return launch_of(plan, place)

    def _observe(self, attempts: Sequence[AttemptId]) -> Mapping[AttemptId, Gang]:
        CHILDREN.reap()
        return {attempt: self._look(attempt) for attempt in attempts}

    def _look(self, attempt: AttemptId) -> Gang:
        at = datetime.now(UTC)
        seen = {f.worker: workers.look(f) for f in self._home.workers(attempt)}
        known = {number: sight for number, sight in seen.items() if sight is not None}
        status = checkpoints.gang(open_storage(self._storage(attempt)), attempt.number)
        return Gang(at=at, workers=known, status=status)

    def _storage(self, attempt: AttemptId) -> str:
        return job_storage_uri(self._home.path, attempt.job_id, self._settings.storage)

    def _find_slots(self) -> Slots:
        """Asking for GPUs takes a moment, so it is done once, and on the door's thread."""
        if self._slots is None:
            self._slots = Slots(self._home, read_hardware())
        return self._slots


def agent_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Ours without what belongs to this process, and with ``python`` meaning the interpreter that
    runs dtp, also where its environment was not activated."""
    env = {name: value for name, value in environ.items() if not name.startswith("DTP_")}
    here = Path(sys.executable).parent
    found = shutil.which("python", path=env.get("PATH"))
    if found is None or Path(found).parent != here:
        env["PATH"] = os.pathsep.join(filter(None, (str(here), env.get("PATH"))))
    return env


def _stop(folders: Sequence[WorkerFolder], grace_s: float) -> None:
    CHILDREN.reap()
    for folder in folders:
        workers.stop(folder, grace_s)
