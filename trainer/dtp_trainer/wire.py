"""What crosses the border of a worker: lines on its stdout, objects in its storage, environment,
exit codes.

Standard library only, so that a user's own parser needs nothing else. `docs/wire.md` is the same
contract for people.

Three carriers:

* **lines**: a worker's agent prints records (JSON objects whose first key is ``dtp``) between its
  ranks' text lines (``2026-11-23T08:30:01.123456Z [rank0] text``). `parse` tells them apart.
* **step files**: a rank appends one JSON object a step to the file named by ``DTP_STEPS_FILE``;
  its agent folds them.
* **objects**: ``gang.json`` and ``checkpoints/head.json`` below ``jobs/<id>/`` in storage, both
  changed by compare-and-set only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any, ClassVar, Literal, TypeAlias

from dtp_trainer.flat import FlatRecord

WIRE_VERSION = 1


class ExitCode(IntEnum):
    """Exit codes of an agent, and of a rank that uses `Session`. A user's script may exit with any
    other."""

    SUCCEEDED = 0
    FAILED = 1
    PAUSED = 75
    """A checkpoint is committed and the worker left because it was asked to (EX_TEMPFAIL: try
    again later)."""
    NO_GANG = 76
    """The gang did not come together in time."""
    HANG = 77
    """No step for longer than the watchdog allows, and the budget for hangs is used up."""
    FENCED = 78
    """A newer attempt or generation owns the job; this worker left without a trace."""
    MAX_DURATION = 79
    """The job trained for as long as it may; a checkpoint is committed."""
    SETUP_FAILED = 80
    """`setup` failed, or the code of the job could not be started at all."""


class Env(StrEnum):
    """Environment of an agent (first block) and of its ranks (second block, beside torchrun's own
    names)."""

    LAUNCH = "DTP_LAUNCH"
    """Path of the launch file: one JSON object, see `Launch`."""

    JOB_ID = "DTP_JOB_ID"
    JOB_NAME = "DTP_JOB_NAME"
    ATTEMPT = "DTP_ATTEMPT"
    GENERATION = "DTP_GENERATION"
    WORKER = "DTP_WORKER"
    STORAGE = "DTP_STORAGE"
    """URI of the folder ``jobs/<id>/`` in storage: ``file:///…`` or ``s3://…``."""
    STEPS_FILE = "DTP_STEPS_FILE"
    CHECKPOINT = "DTP_CHECKPOINT"
    """The job's checkpoint policy as JSON: ``{"every_s": 60.0, "every_steps": null, "keep": 3,
    "keep_best": null}``."""
    OPTIONS = "DTP_OPTIONS"
    """The job's ``training`` block as JSON: the fields of `options.Options` that it sets."""
    ASK_FILE = "DTP_ASK_FILE"
    """Path at which the agent leaves a wish for this rank (`Ask`), which looks there at the end of
    a step and removes it."""
    DATA = "DTP_DATA"
    NO_STEP_FOR = "DTP_NO_STEP_FOR"
    """Seconds that the job allows from one step to the next; empty: it does not say."""


HEAD_KEY = "checkpoints/head.json"
GANG_KEY = "gang.json"


# -------------------------------------------------------------------------- the launch of a worker


@dataclasses.dataclass(frozen=True, slots=True)
class Launch(FlatRecord):
    """All that an agent is told when it starts; the backend writes it, nothing else configures a
    worker."""

    job_id: str
    job_name: str
    attempt: int
    worker: int
    """Number of the worker within the attempt; never used twice, so a replacement gets the next
    free one."""
    storage: str
    """URI of ``jobs/<id>/``."""
    secret: str
    """Shared by the workers of one attempt; proves membership on every connection of the gang."""
    workdir: str
    """Where the ranks run. On this machine: the job's own folder, as it stands."""
    scratch: str
    """A folder of this worker alone: step files, error files, process records."""
    command: tuple[str, ...]
    """What a rank runs, already split: ``("python", "train.py", "--epochs", "3")``, or ``("bash",
    "-c", "…")``."""
    setup: str | None
    env: Mapping[str, str]
    nproc_per_node: int
    workers: int
    """How many workers the operator wished when this one was launched."""
    min_workers: int
    max_workers: int
    host: str
    """Address at which the other workers reach this one; also where the gang's sockets are
    bound."""
    grace_s: float
    """From SIGTERM to SIGKILL; all of a stop, the last checkpoint included, fits in it."""
    error_budget: int
    """Failures of ranks that the gang may answer by itself with a new generation before it gives
    up."""
    hang_budget: int
    start_within_s: float
    no_step_for_s: float | None
    train_until: float | None
    """Unix time at which the gang stops with a checkpoint (`max_duration`); None: never."""
    checkpoint: Mapping[str, Any]
    data: Mapping[str, Any]
    zygotes: str
    """Folder of the sockets of warm processes on this machine."""
    zygote_idle_s: float
    """How long a warm process waits for the next job before it leaves."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The ``training`` block: see `options.Options.to_dict`."""
    trackers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """``{"wandb": {"project": …}, "tensorboard": {}}``: where the metrics go besides."""
    launcher: str = "dtp"
    """``dtp`` or ``torchrun``."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a tracker shows as the configuration of the job."""


CLAIM_FILE = "claim"
"""Beside the launch file: a `ProcessRecord`, made once (O_EXCL) by the process that is this worker
from then on."""
EXIT_FILE = "exit.json"
"""Beside the launch file: an `Exit`, written atomically as the worker's last act."""
RANKS_FOLDER = "ranks"
"""In `Launch.scratch`: one `ProcessRecord` a started rank, ``<anything>.json``; its process group
has the same number."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessRecord(FlatRecord):
    """A process, told from a later one that got the same number."""

    pid: int
    """0 in a claim: nobody; the worker was stopped before it began."""
    start_time: float
    """Unix time in seconds, equal to `psutil.Process(pid).create_time()`."""


# ------------------------------------------------------------------------------- lines of a worker


@dataclasses.dataclass(frozen=True, slots=True)
class Spread(FlatRecord):
    """One quantity over the ranks of a window."""

    min: float
    median: float
    max: float


@dataclasses.dataclass(frozen=True, slots=True)
class Window(FlatRecord):
    """The steps of one worker in about a second, folded. ``values`` are the last step's of its
    lowest rank."""

    kind: ClassVar[str] = "window"
    nested: ClassVar[Mapping[str, type[FlatRecord]]] = {}

    at: float
    """Unix time of the last step in the window."""
    generation: int
    worker: int
    rank: int
    """The lowest rank of this worker; `values` are its own. Rank 0's window is the job's."""
    world_size: int
    step: int
    """Steps completed since the job began, over all attempts."""
    steps: int
    """How many of them lie in this window."""
    epoch: float
    total_steps: int | None
    values: Mapping[str, float]
    """loss, lr, accuracy … as the script reported them; non-finite numbers as they were (NaN,
    Infinity)."""
    samples_per_s: float | None
    """Of the whole job (the global batch over the mean step time), not of this worker."""
    tokens_per_s: float | None
    phases: Mapping[str, Mapping[str, float]]
    """Seconds a step by phase (``step`` = wall time, ``data`` = waiting for data, …): min, median,
    max over this worker's ranks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Host(FlatRecord):
    """What a worker uses of its machine; about every second, for any script."""

    kind: ClassVar[str] = "host"

    at: float
    worker: int
    cpu_percent: float
    """Of this worker's processes; 100 = one core."""
    memory_bytes: int
    """Resident (proportional where the kernel tells) memory of this worker's processes."""
    memory_total_bytes: int
    gpu_percent: tuple[float, ...] = ()
    gpu_memory_bytes: tuple[int, ...] = ()
    gpu_memory_total_bytes: tuple[int, ...] = ()
    gpu_watts: tuple[float | None, ...] = ()
    """This and the next ones: None for a GPU without the sensor, empty when none has it."""
    gpu_celsius: tuple[float | None, ...] = ()
    gpu_sm_mhz: tuple[float | None, ...] = ()
    gpu_pcie_rx_bytes_per_s: tuple[float | None, ...] = ()
    gpu_pcie_tx_bytes_per_s: tuple[float | None, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class GangEvent(FlatRecord):
    """Something that happened to the gang; the leader numbers them, the ledger copies each once."""

    kind: ClassVar[str] = "event"

    seq: int
    """From 1 within the job, without gaps; a new leader goes on where the last one stopped."""
    at: float
    name: str
    """generation_started, rank_failed, worker_lost, worker_leaving, worker_joined, hang,
    checkpoint, leader_elected, gang_ended …"""
    text: str
    """One line for people."""
    generation: int = 0
    step: int | None = None
    worker: int | None = None
    rank: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Exit(FlatRecord):
    """The last line of a worker."""

    kind: ClassVar[str] = "exit"

    at: float
    worker: int
    code: int
    reason: str
    """One line for people: "ValueError: …", "left as asked; newest checkpoint: step 120"."""


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A line that a rank (or the agent itself) wrote."""

    at: float
    source: str
    """``rank3`` or ``worker0``."""
    stream: Literal["out", "err"]
    text: str


Record: TypeAlias = Window | Host | GangEvent | Exit
_RECORDS: Mapping[str, type[Record]] = {r.kind: r for r in (Window, Host, GangEvent, Exit)}
_MARK = '{"dtp":'


def encode(record: Record) -> str:
    """One line, without its newline."""
    return json.dumps(
        {"dtp": WIRE_VERSION, "kind": record.kind, **record.to_dict()}, separators=(",", ":")
    )


def encode_text(line: Text) -> str:
    """``2026-11-23T08:30:01.123456Z [rank0] text``; stderr has ``[rank0!]``."""
    at = datetime.fromtimestamp(line.at, UTC).isoformat(timespec="microseconds")[:-6]
    return f"{at}Z [{line.source}{'!' if line.stream == 'err' else ''}] {line.text}"


def parse(line: str) -> Record | Text | None:
    """A line of a worker's stdout; None for one that neither `encode` nor `encode_text` wrote."""
    if line.startswith(_MARK):
        return _parse_record(line)
    stamp, _, rest = line.partition("Z [")
    source, closed, text = rest.partition("] ")
    if not closed:
        source, closed, text = rest[:-1], rest[-1:], ""
    try:
        at = datetime.fromisoformat(stamp).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
    if closed not in ("] ", "]"):
        return None
    return Text(at, source.rstrip("!"), "err" if source.endswith("!") else "out", text)


def _parse_record(line: str) -> Record | None:
    try:
        data = json.loads(line)
        record: Record = _RECORDS[data["kind"]].from_dict(data)
    except (ValueError, KeyError, TypeError):
        return None
    return record


# ---------------------------------------------------------------------------- step files of a rank


@dataclasses.dataclass(frozen=True, slots=True)
class Step(FlatRecord):
    """One completed step of one rank."""

    at: float
    generation: int
    rank: int
    world_size: int
    step: int
    epoch: float
    total_steps: int | None
    samples: int
    """Of the global batch."""
    tokens: int | None
    values: Mapping[str, float]
    seconds: Mapping[str, float]
    """Phase → seconds; ``step`` is the whole step's wall time."""


def encode_step(step: Step) -> str:
    """One line of a step file, with its newline."""
    return json.dumps(step.to_dict(), separators=(",", ":")) + "\n"


def parse_step(line: str) -> Step | None:
    """None for a line cut short by a kill."""
    try:
        step: Step = Step.from_dict(json.loads(line))
    except (ValueError, TypeError):
        return None
    return step


# ------------------------------------------------------------------------------ objects in storage


class GangPhase(StrEnum):
    """What the gang is doing, as its leader last wrote it."""

    FORMING = "forming"
    RUNNING = "running"
    DRAINING = "draining"
    """Ranks were asked to checkpoint at a step boundary and leave: pause, scale, a worker that
    leaves."""
    ENDED = "ended"


@dataclasses.dataclass(frozen=True, slots=True)
class Member(FlatRecord):
    """A worker as the leader knows it."""

    worker: int
    host: str
    nproc_per_node: int
    first_rank: int | None
    leaving: bool
    cpu_percent: float | None = None
    memory_bytes: int | None = None
    gpu_percent: tuple[float, ...] = ()
    gpu_memory_bytes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Gang(FlatRecord):
    """``gang.json``: leadership, membership, progress and recent events in one object with one
    writer.

    The leader rewrites it by compare-and-set: at once on an event, about once a second otherwise.
    A leader whose write
    is refused was deposed: it kills its ranks and leaves. Who finds the leader's address dead
    takes the next term.
    """

    nested: ClassVar[Mapping[str, type[FlatRecord]]] = {"members": Member, "events": GangEvent}

    attempt: int
    term: int
    leader: int
    """Worker number of the leader."""
    address: str
    """``host:port`` of the leader's socket."""
    phase: str
    generation: int
    """Of the whole job: grows by one with each forming, over all attempts."""
    updated: float
    members: tuple[Member, ...] = ()
    world_size: int = 0
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    last_step_at: float | None = None
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples_per_s: float | None = None
    tokens_per_s: float | None = None
    trend: tuple[float, ...] = ()
    """Throughput of the last 16 windows, oldest first."""
    data_wait: float | None = None
    """Share of the step time spent waiting for data, 0..1."""
    step_s: float | None = None
    """Of a step of this generation, by the mean over all ranks."""
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Phase → its share of the step over all ranks, 0..1."""
    verdict: str = ""
    """data-bound, comm-bound, straggler rank 3, checkpoint, compute; empty: nobody can tell."""
    verdict_why: str = ""
    restarts: int = 0
    """Generations of this attempt that followed a failure."""
    errors_used: int = 0
    """Of the error budget, in this attempt."""
    hangs_used: int = 0
    unsaved_s: float | None = None
    """Seconds of training since the newest checkpoint: what a failure now would cost."""
    leader_errors: int = 0
    """Leaders of this attempt that failed in a row, by mistakes of ours."""
    leader_error: str = ""
    """What failed the leader that wrote this last; empty: nothing did."""
    outcome: int | None = None
    """With phase ENDED: the gang's exit code (`ExitCode`, or the failing rank's own)."""
    detail: str = ""
    """With phase ENDED: why, in one line."""
    events: tuple[GangEvent, ...] = ()
    """The last 200."""


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointEntry(FlatRecord):
    """A committed checkpoint; its folder is ``checkpoints/<name>/``."""

    name: str
    """``step-000123.g0007``."""
    step: int
    generation: int
    attempt: int
    world_size: int
    at: float
    bytes: int
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pinned: bool = False
    verified: bool | None = None
    """True after a background or load-time check of every hash, False when one failed, None
    before."""
    seconds: float | None = None
    """From the copy of its tensors to its commit; None for one of an older version."""


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointHead(FlatRecord):
    """``checkpoints/head.json``: the fence and the list of what exists.

    A checkpoint exists when its entry is here. The leader raises `generation` (compare-and-set)
    before it starts the
    ranks of a new one, and a commit is one compare-and-set that finds its own generation in the
    head; so a commit from an
    older generation is refused, always.
    """

    nested: ClassVar[Mapping[str, type[FlatRecord]]] = {"entries": CheckpointEntry}

    generation: int = 0
    resume: str | None = None
    """Name of the checkpoint from which the next generation starts; each commit sets it to itself,
    `dtp resume --from` to another."""
    entries: tuple[CheckpointEntry, ...] = ()
    """Oldest first, in the order of their commits."""


def encode_object(value: Launch | Gang | CheckpointHead | ProcessRecord | Exit) -> bytes:
    return (json.dumps(value.to_dict(), indent=1) + "\n").encode()


def checkpoint_name(step: int, generation: int) -> str:
    """
    >>> checkpoint_name(123, 7)
    'step-000123.g0007'
    """
    return f"step-{step:06d}.g{generation:04d}"
