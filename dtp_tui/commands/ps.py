"""`dtp ps`: the jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dtp_tui.commands.options import JsonOption

if TYPE_CHECKING:
    from datetime import datetime

    from dtp_engine.views import JobView
    from dtp_tui.output import Output
    from dtp_tui.tables import Row

ENDED_SHOWN = 10


def command(
    *,
    all_jobs: Annotated[
        bool, typer.Option("--all", "-a", help="Every job, however long ago it ended.")
    ] = False,
    json_lines: JsonOption = False,
) -> None:
    """List the jobs.

    Those that have not ended, and the last ten that have.
    """
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output
    from dtp_tui.records import job_record

    views = with_engine(lambda engine: engine.jobs())
    shown = views if all_jobs else recent(views)
    out = Output(json_lines=json_lines)
    if json_lines:
        for view in shown:
            out.emit(job_record(view))
        return
    _show(out, shown, left_out=len(views) - len(shown))


def recent(views: Sequence[JobView]) -> list[JobView]:
    """All that have not ended, and the last few that have; in their order."""
    ended = [view.job.id for view in views if view.job.state.final]
    hidden = set(ended[: max(len(ended) - ENDED_SHOWN, 0)])
    return [view for view in views if view.job.id not in hidden]


def _show(out: Output, views: Sequence[JobView], *, left_out: int) -> None:
    from datetime import UTC, datetime

    from dtp_tui.tables import Column

    if not views:
        out.say("no jobs yet; start one: dtp run job.yaml")
        return
    columns = (
        Column("NAME"),
        Column("ID", drop=1),
        Column("STATE"),
        Column("WORKERS", right=True, drop=2),
        Column("STEP", right=True),
        Column("LOSS", right=True, drop=4),
        Column("RATE", right=True, drop=3),
        Column("TRAINED", right=True, drop=5),
        Column("CHECKPOINT", right=True, drop=6),
        Column("AGE", right=True, drop=7),
    )
    now = datetime.now(UTC)
    out.table(columns, [_row(view, now) for view in views])
    if left_out:
        out.hint(f"{left_out} more ended earlier: dtp ps --all")


def _row(view: JobView, now: datetime) -> Row:
    from dtp_tui import labels

    job, gang = view.job, view.gang
    step, total = (gang.step, gang.total_steps) if gang else (None, None)
    return (
        job.name,
        job.id,
        labels.headline(job, gang),
        labels.workers(job, gang),
        labels.step(step, total),
        labels.value(gang.values.get("loss") if gang else None),
        labels.throughput(gang) if labels.is_fresh(job, gang, now) else labels.UNKNOWN,
        labels.elapsed(job, now),
        _saved(view, now),
        labels.age(job.created_at, now),
    )


def _saved(view: JobView, now: datetime) -> str:
    from dtp_tui import labels

    if view.checkpoint_problem:
        return "damaged"
    saved = view.checkpoint
    return labels.UNKNOWN if saved is None else f"{labels.age(saved.at, now)} ago"
