"""The nouns: what an operator submits, what became of it, and who asked. All frozen; all decoded
by msgspec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from dtp_trainer.options import Options


class JobState(StrEnum):
    """Where a job is. What it is *meant* to become is its `Intent`."""

    QUEUED = "QUEUED"
    """Wanted, not placed: no capacity yet, or waiting for a retry."""
    PROVISIONING = "PROVISIONING"
    """Capacity was asked for."""
    STARTING = "STARTING"
    """Workers are launched; their ranks do not run yet."""
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    """Every worker was asked to leave; what follows is read from the intent."""
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

    @property
    def active(self) -> bool:
        """Something remains to be done without anybody asking; a paused job is neither final nor
        active."""
        return not self.final and self is not JobState.PAUSED


class Intent(StrEnum):
    RUN = "RUN"
    PAUSE = "PAUSE"
    CANCEL = "CANCEL"


class Reason(StrEnum):
    """Why a job is where it is."""

    USER = "USER"
    NO_CAPACITY = "NO_CAPACITY"
    SPOT_INTERRUPTION = "SPOT_INTERRUPTION"
    WORKER_FAILED = "WORKER_FAILED"
    """A rank of the user's script failed and the budget for errors is used up."""
    SAME_FAILURE = "SAME_FAILURE"
    """The same error at the same step three times in a row."""
    WORKER_LOST = "WORKER_LOST"
    SETUP_FAILED = "SETUP_FAILED"
    START_TIMEOUT = "START_TIMEOUT"
    HANG = "HANG"
    BUDGET = "BUDGET"
    MAX_DURATION = "MAX_DURATION"
    INFRASTRUCTURE = "INFRASTRUCTURE"
    RETRYING = "RETRYING"
    NO_STEPS = "NO_STEPS"
    """The script ended with 0 but took no step and formed no process group."""


@dataclass(frozen=True, slots=True)
class NodeRange:
    """How many workers a job may have; a plain number is a range of one."""

    min: int
    max: int

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}..{self.max}"

    def __contains__(self, workers: int) -> bool:
        return self.min <= workers <= self.max


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one worker."""

    gpus: int = 0
    cpus: float = 1.0
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    every: timedelta | None = timedelta(minutes=10)
    every_steps: int | None = None
    keep: int = 3
    keep_best: str | None = None
    """Name of a reported value; "-loss" style is not needed: names that hold loss or error are
    better when smaller."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    on_errors: int = 3
    on_preemption: int | None = None
    """None = unlimited."""
    on_hang: int = 2


@dataclass(frozen=True, slots=True)
class Watchdog:
    start_within: timedelta = timedelta(minutes=15)
    no_step_for: timedelta | None = None


class Launcher(StrEnum):
    """Who starts the ranks of a worker."""

    DTP = "dtp"
    TORCHRUN = "torchrun"


class Artifacts(StrEnum):
    """Which checkpoints are handed to W&B."""

    NEVER = "never"
    BEST = "best"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Wandb:
    """Where in W&B the metrics go besides; what is None is left to W&B's own defaults."""

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    artifacts: Artifacts = Artifacts.NEVER


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job file, parsed once (`spec.py`); no other module reads YAML of jobs."""

    name: str
    run: str | None
    """A command line; None when `task` is set."""
    task: str | None = None
    nodes: NodeRange = NodeRange(1, 1)
    nproc_per_node: int = 1
    resources: Resources = Resources()
    workdir: str = "."
    """Absolute after parsing."""
    setup: str | None = None
    args: Mapping[str, str] = field(default_factory=dict)
    """Options of `task` or appended to `run` as ``--name value``."""
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    """Names; values are taken from the submitter's environment and never shown or stored in the
    spec."""
    data: Mapping[str, str] = field(default_factory=dict)
    launcher: Launcher = Launcher.DTP
    training: Options = field(default_factory=Options)
    """How a step is computed."""
    training_given: tuple[str, ...] = ()
    """The options of `training` that were written, be it as their default: a script's own give way
    to them."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    retry: RetryPolicy = RetryPolicy()
    watchdog: Watchdog = Watchdog()
    max_duration: timedelta | None = None
    stop_grace: timedelta = timedelta(seconds=30)
    priority: int = 50
    tags: Mapping[str, str] = field(default_factory=dict)
    wandb: Wandb | None = None
    tensorboard: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of `training`: all that a script's own options give way to."""
        given = {name: getattr(self.training, name) for name in self.training_given}
        return self.training.to_dict() | given


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the ledger; changed only by the lease holder."""

    id: str
    name: str
    spec: JobSpec
    state: JobState
    intent: Intent
    workers: int
    """How many are wished, within `spec.nodes`."""
    created_at: datetime
    created_by: str
    version: int = 0
    """Grows with each change; a commit names the version that it read."""
    attempt: int = 0
    """Number of the newest attempt; 0 before the first."""
    reason: Reason | None = None
    detail: str = ""
    """One line for people, beside the reason."""
    kill: bool = False
    """CANCEL without a last checkpoint."""
    resume_from: int | None = None
    """Step that the next attempt starts from; None = newest good checkpoint."""
    started_at: datetime | None = None
    """Of the first RUNNING."""
    ended_at: datetime | None = None
    exit_code: int | None = None
    """Of the failing rank, once FAILED."""
    retry_at: datetime | None = None
    errors_used: int = 0
    hangs_used: int = 0
    preemptions: int = 0
    last_failures: tuple[str, ...] = ()
    """Signatures ("ValueError: … @ step 12") of the newest failures, newest last."""
    gang_events_seen: int = 0
    """Sequence number of the last event of the gang that the ledger holds."""
    trained_s: float = 0.0
    """Seconds in RUNNING over earlier attempts."""

    @property
    def active(self) -> bool:
        return self.state.active


class PlacementState(StrEnum):
    PLANNED = "PLANNED"
    """Recorded; the launch may or may not have happened. A replay launches again: launching is
    idempotent."""
    LAUNCHED = "LAUNCHED"
    STOPPING = "STOPPING"
    GONE = "GONE"
    """The platform confirmed that it is gone."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One worker of an attempt, as the ledger remembers it."""

    worker: int
    """Never reused within the attempt."""
    state: PlacementState
    planned_at: datetime
    stop_at: datetime | None = None
    """When it was first asked to stop."""
    ended_at: datetime | None = None
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    job_id: str
    number: int
    created_at: datetime
    secret: str
    placements: tuple[Placement, ...] = ()
    running_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: str = ""
    """One line for people, once ended."""

    @property
    def id(self) -> AttemptId:
        return AttemptId(self.job_id, self.number)

    @property
    def present(self) -> tuple[Placement, ...]:
        """Placements that are not confirmed gone."""
        return tuple(p for p in self.placements if p.state is not PlacementState.GONE)

    @property
    def staying(self) -> tuple[Placement, ...]:
        """Placements that are present and were not asked to leave."""
        return tuple(p for p in self.present if p.state is not PlacementState.STOPPING)


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    job_id: str
    number: int

    def __str__(self) -> str:
        return f"{self.job_id}.a{self.number}"


class RequestKind(StrEnum):
    SUBMIT = "SUBMIT"
    PAUSE = "PAUSE"
    RESUME = "RESUME"
    SCALE = "SCALE"
    STOP = "STOP"
    """Cancel, with a last checkpoint."""
    KILL = "KILL"
    """Cancel at once."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client writes; only the controller changes jobs."""

    key: str
    """Idempotency key: the same key twice is one request."""
    kind: RequestKind
    job_id: str
    actor: str
    at: datetime
    workers: int | None = None
    """SCALE."""
    from_step: int | None = None
    """RESUME."""
    answered_at: datetime | None = None
    refusal: str | None = None
    """One line that says why not, when answered with no."""


@dataclass(frozen=True, slots=True)
class Event:
    """A line of a job's timeline."""

    seq: int
    """Of the whole ledger; 0 before it is recorded."""
    at: datetime
    job_id: str
    attempt: int
    actor: str
    """``ana@laptop``, ``controller`` or ``gang``."""
    name: str
    """submitted, state, launch, worker_gone, generation_started, rank_failed, checkpoint, …
    snake_case."""
    text: str
    """One line for people."""
