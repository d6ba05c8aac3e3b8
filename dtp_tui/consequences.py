"""What will happen if the operator says yes; pure words for the dialogs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from dtp_engine.jobs import Intent, Job, JobState
from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_tui import labels
from dtp_tui.messages import Verb


@dataclass(frozen=True, slots=True)
class Consequence:
    title: str
    lines: tuple[str, ...]
    button: str


def refusal(verb: Verb, job: Job) -> str | None:
    """Why this verb makes no sense for the job as it is; None when it may be asked for."""
    match verb:
        case Verb.PAUSE if job.intent is not Intent.RUN or not job.active:
            return f"{job.name} is not running"
        case Verb.RESUME if job.intent is Intent.RUN and not job.state.final:
            return f"{job.name} is not paused"
        case Verb.RESUME if job.state is JobState.SUCCEEDED:
            return f"{job.name} has succeeded"
        case Verb.STOP if job.state.final:
            return f"{job.name} has ended"
        case Verb.SCALE if job.state.final:
            return f"{job.name} has ended"
        case Verb.SCALE if job.spec.nodes.min == job.spec.nodes.max:
            return f"{job.name} has a fixed number of workers (nodes: {job.spec.nodes})"
        case _:
            return None


def pause(view: JobView, now: datetime) -> Consequence:
    title = f"Pause {view.job.name}?"
    if not _is_placed(view.job):
        return Consequence(title, ("It holds no machine, and will not ask for one.",), "Pause")
    return Consequence(
        title,
        (
            f"{_present(view)} will write a checkpoint at the next step and leave;",
            _freed(_workers(view)),
            "",
            _since_checkpoint(view, now),
            _kept(view),
        ),
        "Pause",
    )


def stop(view: JobView, now: datetime) -> Consequence:
    title = f"Stop {view.job.name} for good?"
    grace = labels.span(view.job.spec.stop_grace)
    if not _is_placed(view.job):
        ends = "It holds no machine. The job ends as Cancelled; its checkpoints are kept."
        return Consequence(title, (ends, "", _since_checkpoint(view, now)), "Stop")
    return Consequence(
        title,
        (
            f"{_present(view)} get {grace} for a last checkpoint, then they are ended.",
            "The job ends as Cancelled; its checkpoints are kept.",
            "",
            _since_checkpoint(view, now),
        ),
        "Stop",
    )


def resume(
    view: JobView,
    checkpoint: wire.CheckpointEntry | None,
    newest: wire.CheckpointEntry | None,
    now: datetime,
) -> Consequence:
    """`checkpoint` None: from the beginning, as there is none."""
    job = view.job
    lines = [f"A new attempt with {labels.plural(job.workers, 'worker')}."]
    if checkpoint is None:
        lines.append("There is no checkpoint: it starts from step 0.")
    else:
        lines.append(
            f"It goes on from step {checkpoint.step:,}, saved {labels.age(checkpoint.at, now)} ago."
        )
    if checkpoint and newest and newest.step > checkpoint.step:
        redone = newest.step - checkpoint.step
        lines.append(f"The {labels.plural(redone, 'step')} after it will be trained again.")
    return Consequence(f"Resume {job.name}?", tuple(lines), "Resume")


def scale(view: JobView, workers: int) -> Consequence:
    """`workers` is within the job's range."""
    job = view.job
    title = f"Scale {job.name} from {job.workers} to {labels.plural(workers, 'worker')}?"
    if workers == job.workers:
        return Consequence(title, ("That is what it has now.",), "Scale")
    if not job.active:
        return Consequence(title, ("Its next attempt will have that many.",), "Scale")
    return Consequence(title, (_by(workers - job.workers), _seam(view)), "Scale")


def _is_placed(job: Job) -> bool:
    return job.state in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING)


def _by(more: int) -> str:
    if more > 0:
        return f"{labels.plural(more, 'worker')} more will be placed, and join when ready."
    return f"{labels.plural(-more, 'worker')} will leave; {_freed(-more)}"


def _freed(workers: int) -> str:
    return "its machine becomes free." if workers == 1 else "their machines become free."


def _seam(view: JobView) -> str:
    if view.gang is None or view.gang.step is None:
        return "It has reported no step yet, so its ranks start again from the beginning."
    return "All checkpoint at one step and go on from it: no sample is lost, none is seen twice."


def _present(view: JobView) -> str:
    return f"Its {labels.plural(_workers(view), 'worker')}"


def _workers(view: JobView) -> int:
    members = len(view.gang.members) if view.gang else 0
    return members or view.job.workers


def _since_checkpoint(view: JobView, now: datetime) -> str:
    step = view.gang.step if view.gang else None
    if view.checkpoint_problem:
        return "The list of its checkpoints is damaged."
    if view.checkpoint is None:
        return "No checkpoint exists yet."
    since = (
        f"Last checkpoint: step {view.checkpoint.step:,}, {labels.age(view.checkpoint.at, now)} ago"
    )
    if step is None or step <= view.checkpoint.step:
        return since + "."
    return f"{since} ({labels.plural(step - view.checkpoint.step, 'step')} since)."


def _kept(view: JobView) -> str:
    if view.gang is None or view.gang.step is None:
        if view.checkpoint is None:
            return "It has reported no step: a resume would start it from the beginning."
        return "A resume goes on from that checkpoint."
    return "Nothing is lost: a resume goes on at the same step and sample."


def of(verb: Verb, view: JobView, now: datetime) -> Consequence:
    """For the verbs that need nothing but a yes."""
    match verb:
        case Verb.PAUSE:
            return pause(view, now)
        case Verb.STOP:
            return stop(view, now)
        case Verb.RESUME:
            return resume(view, view.checkpoint, view.checkpoint, now)
        case Verb.SCALE:
            return scale(view, view.job.workers)
        case _:
            assert_never(verb)
