"""The Backend of the simulated cluster. Any number of them may stand before one cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta

from dtp_engine.backend import (
    Capacity,
    CapacityRequest,
    Cursor,
    Gang,
    LaunchPlan,
    Liveness,
    LogLine,
    Since,
    WorkerSight,
)
from dtp_engine.errors import Unreachable
from dtp_engine.jobs import AttemptId
from dtp_engine.logs import time_of
from dtp_engine.simulated.cluster import Cluster
from dtp_engine.simulated.gang import Worker
from dtp_engine.simulated.lines import lines_between
from dtp_engine.simulated.status import status_of
from dtp_trainer import wire
from dtp_trainer.wire import ExitCode

POLL_S = 0.5
_FORBIDDEN = WorkerSight(
    Liveness.EXITED, int(ExitCode.FENCED), detail="stopped before it was launched"
)


class SimulatedBackend:
    """Implements `dtp_engine.backend.Backend`. Raises `Unreachable` while the cluster is."""

    name = "simulated"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def provision(self, request: CapacityRequest) -> None:
        self._reach().provision(request)

    async def launch(self, plan: LaunchPlan) -> None:
        self._reach().launch(plan)

    async def observe(self, attempts: Sequence[AttemptId]) -> Mapping[AttemptId, Gang]:
        cluster = self._reach()
        at = cluster.clock.now()
        return {attempt: self._look(cluster, attempt, at) for attempt in attempts}

    async def stop(self, attempt: AttemptId, workers: Sequence[int], *, grace: timedelta) -> None:
        self._reach().stop(attempt, workers, kill=not grace)

    async def logs(
        self,
        attempt: AttemptId,
        *,
        after: Cursor | None = None,
        since: Since | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogLine]:
        """In the order of time over all workers."""
        cursors = dict(after or {})
        while True:
            gang = self._reach().gangs.get(attempt)
            if gang is not None:
                gang.advance(self._cluster.now)
                for line in lines_between(gang, cursors, self._cluster.now):
                    cursors[line.worker] = line.cursor
                    if since is None or time_of(line) >= since.at:
                        yield line
            if not follow:
                return
            await self._cluster.clock.sleep(POLL_S)

    async def capacity(self) -> Capacity:
        cluster = self._reach()
        cluster.advance()
        return cluster.capacity(cluster.clock.now())

    async def aclose(self) -> None:
        """The cluster lives on."""

    def status(self, attempt: AttemptId) -> wire.Gang | None:
        """The gang's own word, as ``gang.json`` would hold it."""
        gang = self._cluster.gangs.get(attempt)
        if gang is None:
            return None
        gang.advance(self._cluster.now)
        return status_of(gang, self._cluster.now)

    def _reach(self) -> Cluster:
        if not self._cluster.is_reachable:
            raise Unreachable("the simulated cluster does not answer")
        return self._cluster

    def _look(self, cluster: Cluster, attempt: AttemptId, at: datetime) -> Gang:
        gang = cluster.gangs.get(attempt)
        forbidden = {n: _FORBIDDEN for owner, n in cluster.forbidden if owner == attempt}
        if gang is None:
            return Gang(at, forbidden)
        gang.advance(cluster.now)
        seen = {w.number: self._see(cluster, w) for w in gang.workers.values()}
        return Gang(at, {**forbidden, **seen}, status_of(gang, cluster.now))

    def _see(self, cluster: Cluster, worker: Worker) -> WorkerSight:
        if cluster.hidden_until.get(worker.host, 0.0) > cluster.now:
            return WorkerSight(Liveness.UNKNOWN, host=worker.host)
        return worker.sight()
