"""The Backend protocol and the values that cross it. Implementations: simulated, local (later
aws)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

from dtp_engine.jobs import AttemptId, JobSpec, Reason, Resources
from dtp_trainer import wire


class Liveness(StrEnum):
    ALIVE = "ALIVE"
    EXITED = "EXITED"
    UNKNOWN = "UNKNOWN"
    """The platform could not be asked. Never stops, restarts or forgets anything."""


@dataclass(frozen=True, slots=True)
class WorkerSight:
    """One worker at one moment."""

    liveness: Liveness
    exit_code: int | None = None
    """With EXITED: the agent's exit code; 128 + signal when it was killed; None when the platform
    cannot tell."""
    reason: Reason | None = None
    """With EXITED, when the platform says: SPOT_INTERRUPTION, NO_CAPACITY …"""
    detail: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class Gang:
    """All workers of an attempt as seen at one moment.

    `workers` holds those that the platform knows; a worker that was never launched is absent.
    `status` is the newest ``gang.json`` of this attempt, None before the first or when it could
    not be read. It is read after the workers were looked at, so that of a gang whose workers have
    all exited it holds the last word.
    """

    at: datetime
    workers: Mapping[int, WorkerSight] = field(default_factory=dict)
    status: wire.Gang | None = None


@dataclass(frozen=True, slots=True)
class CapacityRequest:
    attempt: AttemptId
    workers: int
    resources: Resources


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Make these workers of this attempt exist. Idempotent by (attempt, worker): what exists or
    existed is left alone."""

    attempt: AttemptId
    job_name: str
    spec: JobSpec
    workers: tuple[int, ...]
    """Numbers to launch now."""
    wished: int
    secret: str
    errors_left: int
    hangs_left: int
    resume_from: int | None = None
    """Step of the checkpoint to start from; None = newest good one."""
    train_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    cpus: float
    memory_bytes: int
    gpus: int
    gpu_name: str = ""
    price_usd_per_hour: float | None = None
    """None = unknown, never 0."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What there is, in one look. `free_*` is what no worker has reserved."""

    at: datetime
    machines: tuple[Machine, ...]
    free_cpus: float
    free_memory_bytes: int
    free_gpus: int
    largest: Resources
    """The most one worker could ever get here; a job that asks for more is refused at submit."""
    can_grow: bool = False
    """More machines may come after `Backend.provision`."""

    def fits(self, resources: Resources, workers: int) -> bool:
        return (
            resources.cpus * workers <= self.free_cpus + 1e-9
            and resources.gpus * workers <= self.free_gpus
            and (resources.memory_bytes or 0) * workers <= self.free_memory_bytes
        )


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of one worker; `record` is None for text."""

    worker: int
    cursor: str
    """Opaque; hand it back as part of a `Cursor` to go on after this line."""
    text: wire.Text | None
    record: wire.Record | None


Cursor = Mapping[int, str]
"""Worker → the cursor of the last line seen of it."""


@dataclass(frozen=True, slots=True)
class Since:
    """Where to begin in logs that may be long."""

    at: float
    """Unix time; all later lines come."""
    context_bytes: int = 0
    """About so much of what is older comes as well, of each worker."""


class Backend(Protocol):
    """Every method may raise `Unreachable`; none blocks the event loop."""

    name: str

    async def provision(self, request: CapacityRequest) -> None:
        """Ask for capacity; idempotent, returns at once."""
        ...

    async def launch(self, plan: LaunchPlan) -> None: ...

    async def observe(self, attempts: Sequence[AttemptId]) -> Mapping[AttemptId, Gang]:
        """One batched look. An attempt that the backend could not ask about has UNKNOWN workers or
        is absent."""
        ...

    async def stop(self, attempt: AttemptId, workers: Sequence[int], *, grace: timedelta) -> None:
        """SIGTERM now, SIGKILL after `grace`; idempotent, returns at once. `grace` zero kills.

        A worker that was never launched is made impossible to launch and then observed as EXITED.
        """
        ...

    def logs(
        self,
        attempt: AttemptId,
        *,
        after: Cursor | None = None,
        since: Since | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogLine]:
        """Lines of all workers, in order for each worker. Without `follow` it ends at what exists
        now. `since` is for the workers that `after` does not name; a few older lines may come."""
        ...

    async def capacity(self) -> Capacity: ...

    async def aclose(self) -> None: ...
