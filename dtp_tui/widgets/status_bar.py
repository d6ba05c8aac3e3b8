"""The first line of every screen: where we are, what runs, what is free, how old the data are."""

from __future__ import annotations

from collections import Counter

from dtp_engine.backend import Capacity
from dtp_engine.jobs import JobState
from dtp_tui import labels
from dtp_tui.labels import STATES, Tone
from dtp_tui.messages import ClusterPicture
from dtp_tui.widgets.spans import Line, Span, joined

STALE_S = 5.0
_GROUPS = (
    (JobState.RUNNING, "running"),
    (JobState.PAUSED, "paused"),
    (JobState.FAILED, "failed"),
    (JobState.SUCCEEDED, "done"),
)


def status_line(picture: ClusterPicture | None, backend: str, *, is_narrow: bool = False) -> Line:
    """A narrow one has glyphs without words."""
    name = (Span(" dtp ", Tone.BUSY, strong=True), Span(f" {backend}"))
    if picture is None:
        return Line(name, (Span("connecting… ", Tone.QUIET),))
    groups = [name, jobs_by_state(picture, is_narrow=is_narrow), *capacity_groups(picture.capacity)]
    return Line(joined(groups), (*_driver(picture), data_age(picture), Span(" ")))


def jobs_by_state(picture: ClusterPicture, *, is_narrow: bool = False) -> tuple[Span, ...]:
    """``● 3 running  ◌ 1 waiting  ‖ 1 paused``, or ``● 3  ◌ 1  ‖ 1``."""
    states = Counter(view.job.state for view in picture.jobs)
    waiting = sum(n for state, n in states.items() if state.active) - states[JobState.RUNNING]
    parts = [(STATES[s].glyph, states[s], word, STATES[s].tone) for s, word in _GROUPS]
    parts.insert(1, (STATES[JobState.QUEUED].glyph, waiting, "waiting", Tone.BUSY))
    shown = [
        (Span(f"{glyph} ", tone), Span(str(n) if is_narrow else f"{n} {word}"))
        for glyph, n, word, tone in parts
        if n
    ]
    return joined(shown, "  ") or (Span("no jobs", Tone.QUIET),)


def capacity_groups(capacity: Capacity | None) -> list[tuple[Span, ...]]:
    """``CPU 6/16`` and ``GPU 3/8``: reserved of all."""
    if capacity is None:
        return []
    cpus = sum(machine.cpus for machine in capacity.machines)
    gpus = sum(machine.gpus for machine in capacity.machines)
    groups = [_used("CPU", cpus - capacity.free_cpus, cpus)]
    if gpus:
        groups.append(_used("GPU", gpus - capacity.free_gpus, gpus))
    return groups


def _used(what: str, used: float, of: float) -> tuple[Span, ...]:
    full = of > 0 and used >= of
    return Span(f"{what} ", Tone.QUIET), Span(f"{used:g}/{of:g}", Tone.WARN if full else Tone.PLAIN)


def _driver(picture: ClusterPicture) -> tuple[Span, ...]:
    """Said only when it matters: something is active and nobody drives."""
    if picture.driver is None or picture.driver.alive:
        return ()
    if not any(view.job.active for view in picture.jobs):
        return ()
    return (Span("no controller  ", Tone.WARN),)


def data_age(picture: ClusterPicture) -> Span:
    age = max(0.0, (picture.now - picture.at).total_seconds())
    if picture.problem or age > STALE_S:
        return Span(f"stale {labels.duration(age)}", Tone.BAD)
    return Span("live", Tone.QUIET)
