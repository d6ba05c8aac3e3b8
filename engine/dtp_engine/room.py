"""How many workers of each job fit now: who is offered room first, what is kept for whom. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dtp_engine.backend import Capacity
from dtp_engine.errors import UsageError
from dtp_engine.jobs import Job, JobSpec, JobState, Resources


@dataclass(frozen=True, slots=True)
class Room:
    """What one job is offered in one sweep."""

    workers: int
    """How many more workers of this job may be placed now."""
    detail: str = ""
    """Why not more, in one line for people."""
    can_grow: bool = False
    """More may come when capacity is asked for."""


def in_order(jobs: Iterable[Job]) -> Sequence[Job]:
    """Placed jobs first, then by priority, then by age.

    A job that holds machines comes first because it can neither end nor give them back while it
    lacks a worker; were it to queue behind a job that waits for those machines, both would wait
    for ever.
    """
    return sorted(jobs, key=lambda job: (_waits(job), -job.spec.priority, job.created_at, job.id))


class Rooms:
    """Deals out one look at the capacity, job after job, in the order of `in_order`."""

    def __init__(self, capacity: Capacity | None) -> None:
        self._capacity = capacity
        self._free = (
            Resources(capacity.free_gpus, capacity.free_cpus, capacity.free_memory_bytes)
            if capacity
            else Resources(0, 0.0, 0)
        )
        self._waiting: Job | None = None
        """The first job that waits for room; what is free is kept for it."""

    def reserve(self, job: Job, workers: int) -> None:
        """Take room for workers that are planned, but that the backend does not count yet."""
        need = job.spec.resources
        self._free = Resources(
            self._free.gpus - need.gpus * workers,
            self._free.cpus - need.cpus * workers,
            (self._free.memory_bytes or 0) - (need.memory_bytes or 0) * workers,
        )

    def offer(self, job: Job, *, present: int) -> Room:
        """What fits for a job that has `present` workers. The caller reserves what it takes."""
        if self._capacity is None:
            return Room(0, "the backend does not say what is free")
        missing = job.workers - present
        if missing <= 0:
            return Room(0)
        if _waits(job) and self._waiting is not None:
            return Room(0, f"waits behind {self._waiting.name}", self._capacity.can_grow)
        fits = min(missing, _how_many(job.spec.resources, self._free))
        if _waits(job) and fits < job.spec.nodes.min and self._could_ever_fit(job):
            self._waiting = job
        detail = "" if fits == missing else f"needs {_amount(job, missing)}, {self._left(job)} free"
        return Room(fits, detail, self._capacity.can_grow)

    def _could_ever_fit(self, job: Job) -> bool:
        """A job that is larger than all machines together must not hold up the rest."""
        assert self._capacity is not None
        return (
            self._capacity.can_grow or most_workers(job.spec, self._capacity) >= job.spec.nodes.min
        )

    def _left(self, job: Job) -> str:
        """What is free of the resource that is short."""
        need, free = job.spec.resources, self._free
        if need.gpus and _times(free.gpus, need.gpus) < job.workers:
            return f"{max(free.gpus, 0)}"
        if need.cpus and _times(free.cpus, need.cpus) < job.workers:
            return f"{max(free.cpus, 0.0):g}"
        return _gigabytes(max(free.memory_bytes or 0, 0))


def most_workers(spec: JobSpec, capacity: Capacity) -> int:
    """How many workers of this kind all machines could hold if nothing else ran on them."""
    machines = capacity.machines
    whole = Resources(
        sum(m.gpus for m in machines),
        sum(m.cpus for m in machines),
        sum(m.memory_bytes for m in machines),
    )
    return _how_many(spec.resources, whole)


def check_fits_ever(spec: JobSpec, capacity: Capacity) -> None:
    """Raises `UsageError` for a job that could never be placed here."""
    if _how_many(spec.resources, capacity.largest) < 1:
        raise UsageError(
            f"{spec.name}: a worker asks for {_words(spec.resources)}, the largest machine has "
            f"{_words(capacity.largest)}; lower `resources`"
        )
    most_here = most_workers(spec, capacity)
    if not capacity.can_grow and spec.nodes.min > most_here:
        raise UsageError(
            f"{spec.name}: needs at least {spec.nodes.min} workers, all machines here hold "
            f"{most_here} of them; lower `nodes` or `resources`"
        )


def _waits(job: Job) -> bool:
    return job.state not in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING)


def _how_many(need: Resources, free: Resources) -> int:
    return min(
        _times(free.gpus, need.gpus),
        _times(free.cpus, need.cpus),
        _times(free.memory_bytes or 0, need.memory_bytes or 0),
    )


def _times(free: float, need: float) -> int:
    """How often `need` fits; floating sums such as 0.1 + 0.2 must not cost a worker."""
    return max(int((free + 1e-9) // need), 0) if need else 1_000_000


def _amount(job: Job, workers: int) -> str:
    return f"{workers} × {_words(job.spec.resources)}"  # noqa: RUF001


def _words(resources: Resources) -> str:
    parts = [f"{resources.gpus} GPU"] if resources.gpus else []
    if resources.cpus:
        parts.append(f"{resources.cpus:g} CPU")
    if resources.memory_bytes:
        parts.append(_gigabytes(resources.memory_bytes))
    return " + ".join(parts)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
