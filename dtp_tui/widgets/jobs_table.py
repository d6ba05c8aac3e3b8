"""The jobs: what each is doing, how far it is, how fast it goes and what it uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from statistics import fmean
from typing import ClassVar

from textual.binding import Binding, BindingType

from dtp_engine.jobs import Job, JobState, Reason
from dtp_engine.series import sparkline
from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_tui import labels
from dtp_tui.labels import Tone
from dtp_tui.widgets.log_buffer import matcher
from dtp_tui.widgets.spans import Span, label_span
from dtp_tui.widgets.table import Column, LineTable, Row

COLUMNS = (
    Column("NAME", 12, grow=3),
    Column("STATE", 14, grow=2),
    Column("WORKERS", 7, right=True),
    Column("STEP", 11, grow=1, right=True),
    Column("RATE", 8, right=True, rank=1),
    Column("TREND", 8, rank=2),
    Column("USE", 8, right=True, rank=4),
    Column("MEMORY", 9, right=True, rank=5),
    Column("CKPT", 6, right=True, rank=1),
    Column("RAN", 6, right=True, rank=6),
    Column("REASON", 16, grow=8, rank=7),
)
EMPTY = "No jobs yet. Start one with:  dtp run job.yaml"


class JobsTable(LineTable):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "enter",
            "open",
            "Open",
            key_display="enter",
            tooltip="charts, logs, workers …",
        ),
    ]

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(COLUMNS, empty=EMPTY, id=id)

    def show_jobs(self, views: Sequence[JobView], now: datetime, *, wanted: str = "") -> None:
        chosen = filtered(views, wanted)
        empty = f"No job matches /{wanted}" if views else EMPTY
        self.show([job_row(view, now) for view in in_order(chosen)], empty=empty)


def in_order(views: Iterable[JobView]) -> list[JobView]:
    """What runs or waits first, then what is paused, then what has ended; the newest first."""
    newest_first = sorted(views, key=lambda view: view.job.created_at, reverse=True)
    return sorted(newest_first, key=lambda view: (view.job.state.final, not view.job.active))


def filtered(views: Sequence[JobView], wanted: str) -> list[JobView]:
    """By name, id, state or tag; ``!`` before the pattern turns it round."""
    keeps = matcher(wanted)
    return [view for view in views if keeps(_searchable(view))]


def _searchable(view: JobView) -> str:
    job = view.job
    tags = " ".join(f"{key}={value}" for key, value in job.spec.tags.items())
    return f"{job.name} {job.id} {labels.headline(job, view.gang).word} {job.state} {tags}"


def job_row(view: JobView, now: datetime) -> Row:
    job, gang = view.job, view.gang
    live = gang if job.active else None
    ended_or_paused = Tone.QUIET if not job.active else Tone.PLAIN
    return Row(
        job.id,
        (
            Span(job.name, Tone.PLAIN, strong=job.active),
            label_span(labels.headline(job, gang)),
            Span(labels.workers(job, gang), _workers_tone(view)),
            _step(gang),
            Span(rate(live), ended_or_paused),
            Span(sparkline(live.trend) if live else "", Tone.BUSY),
            usage(live),
            Span(labels.size(memory(live)), ended_or_paused),
            Span(age(view.checkpoint, now), Tone.QUIET),
            Span(labels.elapsed(job, now), Tone.QUIET),
            Span(labels.why(job), why_tone(job)),
        ),
    )


def why_tone(job: Job) -> Tone:
    """What was asked for is no reason to worry."""
    if job.reason is Reason.USER:
        return Tone.QUIET
    return Tone.BAD if job.state is JobState.FAILED else Tone.WARN


def age(checkpoint: wire.CheckpointEntry | None, now: datetime) -> str:
    """In whole seconds: a table is looked at, not measured with."""
    if checkpoint is None:
        return labels.UNKNOWN
    passed = max(0.0, now.timestamp() - checkpoint.at)
    return f"{passed:.0f}s" if passed < 10 else labels.duration(passed)


def rate(gang: wire.Gang | None) -> str:
    """Tokens a second where the job counts them, else samples."""
    if gang is None:
        return labels.UNKNOWN
    number = gang.tokens_per_s if gang.tokens_per_s is not None else gang.samples_per_s
    return labels.UNKNOWN if number is None else f"{labels.count(number)}/s"


def _step(gang: wire.Gang | None) -> Span:
    if gang is None or gang.step is None:
        return Span(labels.UNKNOWN, Tone.QUIET)
    return Span(labels.step(gang.step, gang.total_steps))


def usage(gang: wire.Gang | None) -> Span:
    """``gpu 93%`` where there are GPUs, else ``cpu 180%`` (100 = one core)."""
    if gang is None:
        return Span(labels.UNKNOWN, Tone.QUIET)
    gpus = [percent for member in gang.members for percent in member.gpu_percent]
    if gpus:
        return Span(f"gpu {fmean(gpus):.0f}%", Tone.PLAIN)
    cpus = [m.cpu_percent for m in gang.members if m.cpu_percent is not None]
    return Span(f"cpu {sum(cpus):.0f}%" if cpus else labels.UNKNOWN)


def memory(gang: wire.Gang | None) -> int | None:
    """Resident bytes of all workers; None when none has told."""
    known = [m.memory_bytes for m in gang.members if m.memory_bytes is not None] if gang else []
    return sum(known) if known else None


def _workers_tone(view: JobView) -> Tone:
    if not view.job.active:
        return Tone.QUIET
    ready = len(view.gang.members) if view.gang else 0
    return Tone.PLAIN if ready == view.job.workers else Tone.WARN
