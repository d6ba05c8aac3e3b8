"""`dtp show JOB`: all about one job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtp_tui.commands.options import JobArgument, JsonOption

if TYPE_CHECKING:
    from dtp_engine.engine import Engine
    from dtp_engine.jobs import Attempt, Event
    from dtp_engine.views import JobView
    from dtp_trainer.wire import CheckpointEntry
    from dtp_tui.output import Output
    from dtp_tui.postmortem import Findings

EVENTS_SHOWN = 12
CHECKPOINTS_SHOWN = 5


def command(
    job: JobArgument,
    *,
    stacks: Annotated[
        bool, typer.Option("--stacks", help="Of a hang: every frame of every rank.")
    ] = False,
    json_lines: JsonOption = False,
) -> None:
    """Show all about one job.

    Of a job that failed first the rank that did: its traceback and its last lines. Then state and
    why, where ranks hung, workers, attempts, checkpoints, last events, job file.
    """
    from dtp_tui.client import with_engine
    from dtp_tui.commands.events import all_events
    from dtp_tui.output import Output
    from dtp_tui.postmortem import look_into

    async def show(engine: Engine) -> None:
        job_id = (await engine.find(job)).id
        view = await engine.job(job_id)
        attempts = await engine.attempts(job_id)
        saved = () if view.checkpoint_problem else await engine.checkpoints(job_id)
        events = [event async for event in all_events(engine, job_id)]
        found = await look_into(engine, view)
        out = Output(json_lines=json_lines)
        if json_lines:
            out.emit(_record(view, attempts, saved, found))
        else:
            _print_verdict(out, view, found, all_frames=stacks)
            _print(out, view, attempts, saved, events)

    with_engine(show)


def _record(
    view: JobView,
    attempts: Sequence[Attempt],
    saved: Sequence[CheckpointEntry],
    found: Findings,
) -> dict[str, Any]:
    from dtp_tui import postmortem, records

    return {
        **records.job_record(view),
        **postmortem.record(found),
        "members": records.worker_records(view.gang),
        "attempts": [records.attempt_record(attempt) for attempt in attempts],
        "checkpoints": [records.checkpoint_record(entry) for entry in saved],
        "spec": records.spec_record(view.job.spec),
    }


def _print_verdict(out: Output, view: JobView, found: Findings, *, all_frames: bool) -> None:
    """What somebody who asks after a job that failed wants to know first."""
    from dtp_tui import labels, postmortem

    job = view.job
    out.say(f"{job.name}  {job.id}  {out.label(labels.headline(job, view.gang))}")
    if found.failure is not None:
        postmortem.print_failure(out, found.failure)
    postmortem.print_stacks(out, found, job.name, all_frames=all_frames)
    if found.failure is not None or found.stacks:
        out.say()


def _print(
    out: Output,
    view: JobView,
    attempts: Sequence[Attempt],
    saved: Sequence[CheckpointEntry],
    events: Sequence[Event],
) -> None:
    _print_summary(out, view)
    _print_workers(out, view)
    _print_attempts(out, attempts)
    _print_checkpoints(out, view, saved)
    _print_events(out, events)
    _print_spec(out, view)


def _heading(out: Output, title: str) -> None:
    from dtp_tui.labels import Tone

    out.say()
    out.say(out.paint(title, Tone.BUSY))


def _print_summary(out: Output, view: JobView) -> None:
    from datetime import UTC, datetime

    from dtp_tui import labels
    from dtp_tui.postmortem import folded

    job, gang = view.job, view.gang
    now = datetime.now(UTC)
    facts = {
        "why": labels.why(job),
        "workers": f"{labels.workers(job, gang)} (may have {job.spec.nodes})",
        "progress": _progress(view),
        "grace": view.grace_problem,
        "step": labels.step_time(gang),
        "because": gang.verdict_why if gang else "",
        "trained": labels.elapsed(job, now) if job.started_at else "",
        "submitted": f"{labels.moment(job.created_at)} by {job.created_by}",
        "ended": labels.moment(job.ended_at) if job.ended_at else "",
        "exit code": "" if job.exit_code is None else f"{job.exit_code} of the failing rank",
    }
    for name, fact in facts.items():
        for at, part in enumerate(folded(out, fact, indent=13) if fact else ()):
            out.say(f"  {'' if at else name:<10} {part}")


def _progress(view: JobView) -> str:
    from datetime import UTC, datetime

    from dtp_tui import labels

    gang = view.gang
    if gang is None or gang.step is None:
        return ""
    values = [f"{name} {labels.value(value, name)}" for name, value in gang.values.items()]
    fresh = labels.is_fresh(view.job, gang, datetime.now(UTC))
    rate = [labels.throughput(gang)] if fresh else []
    return "  ".join([f"step {labels.step(gang.step, gang.total_steps)}", *values, *rate])


def _print_workers(out: Output, view: JobView) -> None:
    from dtp_tui import labels
    from dtp_tui.tables import Column

    if view.gang is None or not view.job.active or not view.gang.members:
        return
    _heading(out, f"Workers, generation {view.gang.generation}")
    columns = [
        Column("WORKER"),
        Column("HOST"),
        Column("RANKS"),
        Column("CPU", right=True),
        Column("MEMORY", right=True),
        Column("GPU", right=True),
    ]
    rows = [
        (
            f"{m.worker}{' leader' if m.worker == view.gang.leader else ''}",
            m.host,
            _ranks(m.first_rank, m.nproc_per_node) + (" leaving" if m.leaving else ""),
            labels.UNKNOWN if m.cpu_percent is None else f"{m.cpu_percent:.0f}%",
            labels.size(m.memory_bytes),
            " ".join(f"{share:.0f}%" for share in m.gpu_percent) or labels.UNKNOWN,
        )
        for m in view.gang.members
    ]
    out.table(columns, rows)


def _ranks(first: int | None, count: int) -> str:
    from dtp_tui import labels

    if first is None:
        return labels.UNKNOWN
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _print_attempts(out: Output, attempts: Sequence[Attempt]) -> None:
    from dtp_tui import labels
    from dtp_tui.cleaning import harmless
    from dtp_tui.postmortem import said_once

    if not attempts:
        return
    _heading(out, "Attempts")
    outcomes = said_once(attempt.outcome for attempt in attempts)
    for attempt, told in zip(attempts, outcomes, strict=True):
        end = labels.clock(attempt.ended_at) if attempt.ended_at else "now"
        began = labels.moment(attempt.created_at)
        workers = labels.plural(len(attempt.placements), "worker")
        outcome = harmless(told)
        out.say(f"  {attempt.number}  {began} to {end}  {workers}  {outcome}".rstrip())


def _print_checkpoints(out: Output, view: JobView, saved: Sequence[CheckpointEntry]) -> None:
    from dtp_tui.commands.ckpt import print_checkpoints
    from dtp_tui.postmortem import folded

    if saved or view.checkpoint_problem:
        _heading(out, "Checkpoints")
    if saved:
        print_checkpoints(out, saved[-CHECKPOINTS_SHOWN:])
    for part in folded(out, view.checkpoint_problem, indent=2) if view.checkpoint_problem else ():
        out.say(f"  {part}")


def _print_events(out: Output, events: Sequence[Event]) -> None:
    from dataclasses import replace

    from dtp_tui.commands.events import event_line
    from dtp_tui.postmortem import said_once

    if not events:
        return
    _heading(out, "Last events")
    newest = events[-EVENTS_SHOWN:]
    for event, text in zip(newest, said_once(event.text for event in newest), strict=True):
        out.say(f"  {event_line(out, replace(event, text=text))}")


def _print_spec(out: Output, view: JobView) -> None:
    import yaml

    from dtp_tui.records import spec_record

    _heading(out, "Job file, defaults filled in")
    text = yaml.safe_dump(spec_record(view.job.spec), sort_keys=False, allow_unicode=True)
    for line in text.splitlines():
        out.say(f"  {line}")
