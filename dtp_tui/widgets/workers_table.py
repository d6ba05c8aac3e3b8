"""The workers of a job's current attempt: where each is, what it uses, and who is slow."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median_low

from dtp_engine.jobs import Attempt, Placement, PlacementState
from dtp_engine.series import MetricHistory
from dtp_trainer import wire
from dtp_tui import labels
from dtp_tui.labels import Tone
from dtp_tui.messages import JobPicture
from dtp_tui.widgets.spans import Span
from dtp_tui.widgets.table import Column, LineTable, Row

COLUMNS = (
    Column("WORKER", 6, right=True),
    Column("STATE", 16, grow=2),
    Column("RANKS", 6),
    Column("HOST", 14, grow=2, rank=3),
    Column("CPU", 6, right=True),
    Column("MEMORY", 9, right=True),
    Column("GPU", 5, right=True, rank=2),
    Column("GPU MEM", 9, right=True, rank=4),
    Column("STEP TIME", 9, right=True),
    Column("LAG", 6, right=True, rank=1),
)
SLOW = 1.25
"""A worker whose step takes so much longer than the median one's is marked."""


class WorkersTable(LineTable):
    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(COLUMNS, empty="No workers: nothing is placed.", id=id)

    def show_job(self, picture: JobPicture) -> None:
        self.show(worker_rows(picture.view.gang, newest(picture.attempts), picture.history))


def newest(attempts: Sequence[Attempt]) -> Attempt | None:
    return max(attempts, key=lambda attempt: attempt.number, default=None)


def worker_rows(
    gang: wire.Gang | None, attempt: Attempt | None, history: MetricHistory
) -> list[Row]:
    """One for each worker that the ledger or the gang knows; those that are gone come last."""
    members = {member.worker: member for member in gang.members} if gang else {}
    placements = {p.worker: p for p in attempt.placements} if attempt else {}
    numbers = sorted(
        members.keys() | placements.keys(), key=lambda n: (_gone(placements.get(n)), n)
    )
    usual = _usual_step(history, list(members))
    return [_row(n, members.get(n), placements.get(n), gang, history, usual) for n in numbers]


def _row(
    number: int,
    member: wire.Member | None,
    placement: Placement | None,
    gang: wire.Gang | None,
    history: MetricHistory,
    usual: float | None,
) -> Row:
    here = Tone.QUIET if member is None else Tone.PLAIN
    took = history.last("step_s", number) if member else None
    return Row(
        str(number),
        (
            Span(str(number), here, strong=member is not None),
            state(member, placement, leads=gang is not None and gang.leader == number),
            Span(_ranks(member), here),
            Span(member.host if member else "", here),
            Span(_share(member.cpu_percent if member else None), here),
            Span(labels.size(member.memory_bytes if member else None), here),
            Span(
                _share(fmean(member.gpu_percent) if member and member.gpu_percent else None), here
            ),
            Span(labels.size(sum(member.gpu_memory_bytes) or None if member else None), here),
            Span(labels.UNKNOWN if took is None else labels.seconds(took), here),
            _lag(took, usual),
        ),
    )


def state(member: wire.Member | None, placement: Placement | None, *, leads: bool) -> Span:
    if member is not None and member.leaving:
        return Span("◕ leaving", Tone.BUSY)
    if member is not None and not _gone(placement):
        return Span("● leads" if leads else "● in the gang", Tone.GOOD)
    if placement is None:
        return Span("◌ unknown", Tone.QUIET)
    match placement.state:
        case PlacementState.GONE:
            code = "" if placement.exit_code is None else f", exit {placement.exit_code}"
            bad = placement.exit_code not in (None, 0, wire.ExitCode.PAUSED)
            return Span(f"□ gone{code}", Tone.BAD if bad else Tone.QUIET)
        case PlacementState.STOPPING:
            return Span("◕ stopping", Tone.BUSY)
        case PlacementState.PLANNED:
            return Span("◔ being placed", Tone.BUSY)
        case _:
            return Span("◑ starting", Tone.BUSY)


def _gone(placement: Placement | None) -> bool:
    return placement is not None and placement.state is PlacementState.GONE


def _ranks(member: wire.Member | None) -> str:
    if member is None or member.first_rank is None:
        return labels.UNKNOWN
    last = member.first_rank + member.nproc_per_node - 1
    return str(last) if last == member.first_rank else f"{member.first_rank}-{last}"


def _share(percent: float | None) -> str:
    return labels.UNKNOWN if percent is None else f"{percent:.0f}%"


def _usual_step(history: MetricHistory, workers: Sequence[int]) -> float | None:
    known = [history.last("step_s", worker) for worker in workers]
    values = [value for value in known if value is not None]
    return median_low(values) if len(values) > 1 else None


def _lag(took: float | None, usual: float | None) -> Span:
    if took is None or not usual:
        return Span("")
    tone = Tone.WARN if took > usual * SLOW else Tone.QUIET
    return Span(f"{(took / usual - 1) * 100:+.0f}%", tone)
