"""admit(job, request) → the job with its new intent, or why not. Pure.

A request changes what is wanted of a job, never where it is; that follows in `lifecycle`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import assert_never

from dtp_engine.jobs import Event, Intent, Job, JobState, Request, RequestKind


@dataclass(frozen=True, slots=True)
class Admission:
    job: Job
    answer: Request
    """The request with `answered_at`, and with `refusal` when the answer is no."""
    event: Event | None
    """None for a no, and for what was so already."""


class _No(Exception):
    """The message is the refusal, one line for people."""


def admit(job: Job, request: Request, now: datetime) -> Admission:
    try:
        wanted, text = _wanted(job, request)
    except _No as no:
        return Admission(job, replace(request, answered_at=now, refusal=str(no)), None)
    answer = replace(request, answered_at=now)
    told = wanted != job or request.kind is RequestKind.SUBMIT
    event = Event(0, now, job.id, job.attempt, request.actor, request.kind.lower(), text)
    return Admission(wanted, answer, event if told else None)


def _wanted(job: Job, request: Request) -> tuple[Job, str]:
    match request.kind:
        case RequestKind.SUBMIT:
            return job, f"submitted; {_workers(job.workers)} wished"
        case RequestKind.PAUSE:
            return _pause(job)
        case RequestKind.RESUME:
            return _resume(job, request.from_step)
        case RequestKind.SCALE:
            return _scale(job, request.workers)
        case RequestKind.STOP:
            return _cancel(job, kill=job.kill), "asked to stop after a checkpoint"
        case RequestKind.KILL:
            return _cancel(job, kill=True), "asked to be killed"
        case _:
            assert_never(request.kind)


def _pause(job: Job) -> tuple[Job, str]:
    _refuse_final(job)
    if job.intent is Intent.CANCEL:
        raise _No(f"{job.name} is being cancelled; it can no longer be paused")
    return replace(job, intent=Intent.PAUSE), "asked to pause"


def _resume(job: Job, from_step: int | None) -> tuple[Job, str]:
    _refuse_final(job)
    if job.intent is Intent.CANCEL:
        raise _No(f"{job.name} is being cancelled; submit it again instead")
    if job.intent is Intent.RUN:
        if job.state is JobState.QUEUED and job.retry_at is not None and from_step is None:
            return replace(job, retry_at=None), "asked to try again now"
        first = "; pause it first" if from_step is not None else ""
        raise _No(f"{job.name} is {job.state} already{first}")
    text = "asked to resume" + (f" from step {from_step}" if from_step is not None else "")
    return replace(job, intent=Intent.RUN, resume_from=from_step, retry_at=None), text


def _scale(job: Job, workers: int | None) -> tuple[Job, str]:
    _refuse_final(job)
    if workers is None:
        raise _No("a request to scale must name the number of workers")
    if job.intent is Intent.CANCEL:
        raise _No(f"{job.name} is being cancelled; it can no longer be scaled")
    if workers not in job.spec.nodes:
        raise _No(f"{job.name} may have {_range(job)}, not {workers}; see `nodes` in its file")
    return replace(job, workers=workers), f"asked to scale {job.workers} → {workers}"


def _cancel(job: Job, *, kill: bool) -> Job:
    if job.state is JobState.CANCELLED:
        return job
    _refuse_final(job)
    return replace(job, intent=Intent.CANCEL, kill=kill)


def _refuse_final(job: Job) -> None:
    if job.state.final:
        raise _No(f"{job.name} has {_ended(job.state)} already")


def _ended(state: JobState) -> str:
    return "been cancelled" if state is JobState.CANCELLED else state.lower()


def _range(job: Job) -> str:
    return f"{job.spec.nodes} workers" if job.spec.nodes.max > 1 else "1 worker"


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"
