"""States, reasons, durations, bytes, counts and money as words, glyphs and tones.

Pure; shared by both faces. A tone is what a thing means to the reader; which colour that is, each
face decides for itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import assert_never

from dtp_engine.jobs import Intent, Job, JobState, Reason
from dtp_engine.quantities import write_duration
from dtp_trainer import wire
from dtp_tui.cleaning import harmless

UNKNOWN = "—"
"""Shown for what nobody knows; never 0."""


class Tone(StrEnum):
    GOOD = "good"
    BUSY = "busy"
    """Something is under way; no action needed."""
    WARN = "warn"
    BAD = "bad"
    QUIET = "quiet"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Label:
    word: str
    glyph: str
    """One cell wide."""
    tone: Tone

    def __str__(self) -> str:
        return f"{self.glyph} {self.word}"


STATES: Mapping[JobState, Label] = {
    JobState.QUEUED: Label("Queued", "◌", Tone.QUIET),
    JobState.PROVISIONING: Label("Finding machines", "◔", Tone.BUSY),
    JobState.STARTING: Label("Starting", "◑", Tone.BUSY),
    JobState.RUNNING: Label("Running", "●", Tone.GOOD),
    JobState.STOPPING: Label("Stopping", "◕", Tone.BUSY),
    JobState.PAUSED: Label("Paused", "‖", Tone.WARN),
    JobState.SUCCEEDED: Label("Succeeded", "✓", Tone.GOOD),
    JobState.FAILED: Label("Failed", "✗", Tone.BAD),
    JobState.CANCELLED: Label("Cancelled", "□", Tone.QUIET),
}

REASONS: Mapping[Reason, str] = {
    Reason.USER: "asked for",
    Reason.NO_CAPACITY: "no free capacity",
    Reason.SPOT_INTERRUPTION: "spot machine taken back",
    Reason.WORKER_FAILED: "the script failed",
    Reason.SAME_FAILURE: "same error at the same step three times",
    Reason.WORKER_LOST: "a worker was lost",
    Reason.SETUP_FAILED: "set-up failed",
    Reason.START_TIMEOUT: "did not start in time",
    Reason.HANG: "no step for too long",
    Reason.BUDGET: "budget used up",
    Reason.MAX_DURATION: "ran for as long as it may",
    Reason.INFRASTRUCTURE: "infrastructure",
    Reason.RETRYING: "waiting to retry",
    Reason.NO_STEPS: "took no step",
}


def headline(job: Job, gang: wire.Gang | None = None) -> Label:
    """What the job is doing, in a word or two: its state, sharpened by what is wanted of it.

    "Pausing…", "Scaling 2 → 4" and "Recovering…" are not states of the machine; they are made here.
    """
    if not job.active:
        return STATES[job.state]
    leaving = _leaving(job)
    if leaving is not None:
        return leaving
    if job.state is JobState.STOPPING:
        return Label("Restarting…", "↻", Tone.BUSY)
    if job.state is JobState.QUEUED:
        return _waiting(job)
    if job.state is JobState.STARTING and job.started_at is not None:
        return Label("Resuming…", "◑", Tone.BUSY)
    if job.state is JobState.RUNNING and gang is not None:
        return _running(job, gang)
    return STATES[job.state]


def _leaving(job: Job) -> Label | None:
    match job.intent:
        case Intent.PAUSE:
            return Label("Pausing…", "◕", Tone.BUSY)
        case Intent.CANCEL:
            return Label("Killing…" if job.kill else "Stopping…", "◕", Tone.BUSY)
        case Intent.RUN:
            return None
        case _:
            assert_never(job.intent)


def _waiting(job: Job) -> Label:
    if job.reason is Reason.NO_CAPACITY:
        return Label("Waiting for room", "◌", Tone.WARN)
    if job.reason is None or job.reason is Reason.USER:
        return STATES[JobState.QUEUED]
    return Label("Retrying…", "↻", Tone.WARN)


def _running(job: Job, gang: wire.Gang) -> Label:
    """A gang smaller than wished just runs: there may be no room for more."""
    had = gang.world_size // job.spec.nproc_per_node
    changing = gang.phase in (wire.GangPhase.DRAINING, wire.GangPhase.FORMING)
    if changing and had and had != job.workers:
        return Label(f"Scaling {had} → {job.workers}", "⇅", Tone.BUSY)
    match gang.phase:
        case wire.GangPhase.DRAINING:
            return Label("Checkpointing…", "◕", Tone.BUSY)
        case wire.GangPhase.FORMING if gang.step is not None or gang.restarts:
            return Label("Recovering…", "↻", Tone.WARN)
        case _:
            return STATES[JobState.RUNNING]


def why(job: Job) -> str:
    """Why it is where it is, in one line; empty when there is nothing to say.

    The detail says more than the reason's own words, which stand in when there is none.
    """
    if job.state is JobState.SUCCEEDED and job.reason is None:
        return ""
    if job.detail:
        return harmless(job.detail)
    return "" if job.reason in (None, Reason.USER) else REASONS[job.reason]


# -------------------------------------------------------------------------------- time


def duration(seconds: float) -> str:
    """At most two units: ``0.42s``, ``9.3s``, ``45s``, ``3m12s``, ``2h05m``, ``1d04h``.

    >>> duration(192)
    '3m12s'
    """
    if not math.isfinite(seconds):
        return UNKNOWN
    seconds = max(seconds, 0.0)
    if seconds < 9.95:
        return f"{seconds:.2f}s" if seconds < 0.995 else f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m{rest:02}s"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02}h" if days else f"{hours}h{minutes:02}m"


def span(value: timedelta) -> str:
    """As a job file writes it, exact: ``1h30m``.

    >>> span(timedelta(minutes=90))
    '1h30m'
    """
    return write_duration(value)


def age(at: datetime | float | None, now: datetime) -> str:
    """How long ago, without the word; unknown when `at` is None. A float is Unix time."""
    if at is None:
        return UNKNOWN
    then = at if isinstance(at, int | float) else at.timestamp()
    return duration(max(now.timestamp() - then, 0.0))


def clock(at: datetime | float) -> str:
    """Local time of day, ``14:03:07``."""
    return _local(at).strftime("%H:%M:%S")


def moment(at: datetime | float) -> str:
    """Local date and time, ``2026-11-23 14:03:07``."""
    return _local(at).strftime("%Y-%m-%d %H:%M:%S")


def _local(at: datetime | float) -> datetime:
    then = datetime.fromtimestamp(at, UTC) if isinstance(at, int | float) else at
    return then.astimezone()


def elapsed(job: Job, now: datetime) -> str:
    """Since the first RUNNING until the end, or until now; unknown before it ran."""
    if job.started_at is None:
        return UNKNOWN
    return duration(((job.ended_at or now) - job.started_at).total_seconds())


# -------------------------------------------------------------------------------- quantities


def size(count: int | float | None) -> str:
    """Bytes in binary units: ``512 B``, ``1.5 KiB``, ``16.0 GiB``."""
    if count is None or not math.isfinite(count):
        return UNKNOWN
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1023.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


def count(number: float | None) -> str:
    """Three significant digits: ``7``, ``950``, ``1.23k``, ``45.6M``."""
    if number is None or not math.isfinite(number):
        return UNKNOWN
    if abs(number) < 999.5:
        return f"{number:.0f}" if number == int(number) or abs(number) >= 99.95 else f"{number:.3g}"
    value = float(number)
    for unit in ("k", "M", "G"):
        value /= 1000
        if abs(value) < 999.5:
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f}{unit}"
    return f"{value / 1000:.2f}T"


def value(number: float | None, name: str = "") -> str:
    """A reported value: four significant digits; a share named accuracy or mfu as a
    percentage, bytes as a size."""
    if number is None:
        return UNKNOWN
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "∞" if number > 0 else "-∞"
    if name.endswith("_bytes"):
        return size(number)
    if ("acc" in name or name == "mfu") and 0.0 <= number <= 1.0:
        return percent(number)
    if number and not 1e-4 <= abs(number) < 1e6:
        return f"{number:.2e}"
    return f"{number:.4g}"


def percent(share: float | None) -> str:
    """A share from 0 to 1: ``97.3%``."""
    return UNKNOWN if share is None or not math.isfinite(share) else f"{share * 100:.1f}%"


def money(usd: float | None) -> str:
    """Dollars; unknown when nobody knows the price."""
    if usd is None or not math.isfinite(usd):
        return UNKNOWN
    return f"${usd:,.2f}" if usd == 0 or abs(usd) >= 0.095 else f"${usd:.4f}"


FRESH_S = 10.0
"""A gang that runs writes its status about once a second."""


def is_fresh(job: Job, gang: wire.Gang | None, now: datetime) -> bool:
    """What the gang said last is still so; not when its whole machine may have died since."""
    return job.active and gang is not None and now.timestamp() - gang.updated < FRESH_S


def throughput(gang: wire.Gang | None) -> str:
    """Tokens when the job counts them, else samples."""
    if gang is None:
        return UNKNOWN
    if gang.tokens_per_s is not None:
        return f"{count(gang.tokens_per_s)} tok/s"
    return UNKNOWN if gang.samples_per_s is None else f"{count(gang.samples_per_s)}/s"


PHASES = ("data", "h2d", "forward", "backward", "comm", "optimizer", "checkpoint", "other")
"""Of a step, in the order in which they come."""


def phases(shares: Mapping[str, float], most: int = 4) -> list[str]:
    """The largest ones, in the order of a step: ``forward 38%``; not what rounds to nothing."""
    largest = sorted(shares, key=lambda name: shares[name], reverse=True)[:most]
    shown = [name for name in largest if shares[name] >= 0.005]
    order = {name: place for place, name in enumerate(PHASES)}
    return [
        f"{name} {shares[name]:.0%}"
        for name in sorted(shown, key=lambda name: order.get(name, len(PHASES)))
    ]


def step_time(gang: wire.Gang | None) -> str:
    """``41 ms: forward 38% backward 40% comm 9% → comm-bound``; empty before the first numbers."""
    if gang is None or gang.step_s is None:
        return ""
    said = [f"{seconds(gang.step_s)}:", *phases(gang.phases)]
    return " ".join([*said, "→", gang.verdict] if gang.verdict else said)


def seconds(value: float) -> str:
    """Of one step: ``840 µs``, ``12.3 ms``, ``1.24 s``."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def step(done: int | None, total: int | None) -> str:
    """``120/500``, or ``120`` when nobody knows how many there will be."""
    if done is None:
        return UNKNOWN
    return str(done) if total is None else f"{done}/{total}"


def workers(job: Job, gang: wire.Gang | None) -> str:
    """Present of wished: ``2/4``; just ``0`` of a job that holds no machine."""
    if not job.active or gang is None:
        return f"0/{job.workers}" if job.active else str(job.workers)
    return f"{len(gang.members)}/{job.workers}"


def plural(number: int, noun: str) -> str:
    """
    >>> plural(1, "worker"), plural(2, "worker")
    ('1 worker', '2 workers')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
