"""How far the ranks of a generation are, and which of them is behind. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from dtp_trainer import wire
from dtp_trainer.gang.attribution import Attribution, told
from dtp_trainer.gang.messages import Beat, RankExited

TREND_WINDOWS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class RankProgress:
    step: int
    """The last one completed; 0 before the first of this generation."""
    at: float
    """When the leader heard of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Of the job as a whole (what an operator sees) and of each rank (what the watchdog needs)."""

    shown: wire.Gang | None = None
    """The ``gang.json`` that this leader found; its numbers stand until there are newer ones."""
    window: wire.Window | None = None
    """The newest of rank 0."""
    trend: tuple[float, ...] = ()
    hosts: Mapping[int, wire.Host] = dataclasses.field(default_factory=dict)
    ranks: Mapping[int, RankProgress] = dataclasses.field(default_factory=dict)
    attribution: Attribution = dataclasses.field(default_factory=Attribution)
    newest: int = 0
    """The newest step that any rank of this generation told of; 0 before the first."""
    reporting: bool = False
    """The script reports steps, so a missing one means something: a rank opened a step file, or an
    older generation took a step."""
    formed_group: bool = False
    """In this attempt, a rank joined a process group."""

    @property
    def step(self) -> int | None:
        """Where the job stands, which may be before where it was: generations start from
        checkpoints. None before the job's first step."""
        source = self.window or self.shown
        return self.newest or (source.step if source else None)

    @property
    def total_steps(self) -> int | None:
        source = self.window or self.shown
        return source.total_steps if source else None

    @property
    def finished(self) -> bool:
        """The script told how many steps there are and has taken them all."""
        step, total = self.step, self.total_steps
        return step is not None and (total is None or step >= total)


def begun(progress: Progress, ranks: Iterable[int], now: float) -> Progress:
    """A generation with these ranks starts."""
    fresh = {rank: RankProgress(0, now) for rank in ranks}
    reporting = progress.reporting or progress.step is not None
    return dataclasses.replace(
        progress, ranks=fresh, reporting=reporting, newest=0, attribution=Attribution()
    )


def heard(progress: Progress, worker: int, beat: Beat, *, generation: int, now: float) -> Progress:
    """A member's heartbeat; numbers of older generations are left aside."""
    hosts = {**progress.hosts, worker: beat.host} if beat.host else progress.hosts
    progress = dataclasses.replace(
        progress, hosts=hosts, formed_group=progress.formed_group or beat.formed_group
    )
    if beat.generation != generation:
        return progress
    progress = dataclasses.replace(
        progress,
        ranks=_advanced(progress.ranks, beat.steps, now),
        newest=_newest(progress, beat.steps),
        reporting=progress.reporting or beat.reporting,
        attribution=_attributed(progress.attribution, worker, beat),
    )
    return _with_window(progress, beat.window)


def forget_worker(progress: Progress, worker: int) -> Progress:
    hosts = {key: host for key, host in progress.hosts.items() if key != worker}
    return dataclasses.replace(progress, hosts=hosts)


def exited(progress: Progress, how: RankExited) -> Progress:
    """A rank is gone, and not waited for."""
    kept = {rank: p for rank, p in progress.ranks.items() if rank != how.rank}
    return dataclasses.replace(
        progress,
        ranks=kept,
        newest=max(progress.newest, how.step),
        formed_group=progress.formed_group or how.formed_group,
    )


def stalled_since(progress: Progress) -> float | None:
    """When the slowest rank last moved; None when no rank is running."""
    return min((rank.at for rank in progress.ranks.values()), default=None)


def behind(progress: Progress) -> int | None:
    """The rank that holds the others up; None when none is known to be further."""
    steps = {rank: p.step for rank, p in progress.ranks.items()}
    slowest = min(steps, key=lambda rank: (steps[rank], rank), default=None)
    return slowest if slowest is not None and steps[slowest] < progress.newest else None


@dataclasses.dataclass(frozen=True, slots=True)
class Stall:
    """No rank moves; as the leader saw it before it asked the ranks where they stand."""

    rank: int | None
    """The one that is behind by its steps."""
    step: int
    """Its last one, or that of all."""
    newest: int
    seconds: float


def stall(progress: Progress, now: float) -> Stall:
    rank = behind(progress)
    step = progress.newest if rank is None else progress.ranks[rank].step
    return Stall(rank, step, progress.newest, now - (stalled_since(progress) or now))


def describe_stall(stall: Stall, stuck: RankExited | None) -> tuple[int | None, str]:
    """The rank to name, if one can be, and a line about it. `stuck`: it stood still by itself while
    others waited for it."""
    quiet = f"no step for {stall.seconds:.0f} s"
    named = stuck.rank if stuck is not None and stall.rank is None else stall.rank
    stands = f"it stands in {stuck.stands_in}" if stuck and stuck.rank == named else ""
    if stall.rank is not None:
        steps = f"its last step is {stall.step}, the others' {stall.newest}"
        return named, f"rank {named} is behind: {'; '.join(filter(None, (steps, stands, quiet)))}"
    since = f"step {stall.newest}" if stall.newest else "the start"
    if named is not None:
        return named, f"rank {named} is behind: {stands}, the others wait since {since}"
    after = f"all ranks stopped after step {stall.newest}" if stall.newest else "no rank took one"
    return None, f"{quiet}: {after}"


def describe_parting(stall: Stall, odd: RankExited, others: str) -> str:
    """All wait, and `odd` elsewhere than the `others`."""
    since = f"step {stall.newest}" if stall.newest else "the start"
    where = f"rank {odd.rank} waits in {odd.stands_in}, the others in {others}"
    return f"{where}, since {since}: it left out, or added, a call that all must make"


def _advanced(
    ranks: Mapping[int, RankProgress], steps: Mapping[str, int], now: float
) -> dict[int, RankProgress]:
    advanced = dict(ranks)
    if any(steps.values()) and not any(rank.step for rank in ranks.values()):
        # The start is over for all: how long it took says nothing about the ranks not heard of yet.
        advanced = {rank: RankProgress(0, now) for rank in ranks}
    for name, step in steps.items():
        rank = int(name)
        known = advanced.get(rank)
        if known is not None and step != known.step:  # less: it went back to a checkpoint
            advanced[rank] = RankProgress(step, now)
    return advanced


def _newest(progress: Progress, steps: Mapping[str, int]) -> int:
    """Ranks that went back to a checkpoint do so together."""
    known = {name: progress.ranks.get(int(name)) for name in steps}
    went_back = any(k is not None and steps[name] < k.step for name, k in known.items())
    return max((0 if went_back else progress.newest, *steps.values()))


def _attributed(known: Attribution, worker: int, beat: Beat) -> Attribution:
    return told(known, worker, beat.window.at, beat.phases) if beat.window else known


def _same(window: wire.Window, known: wire.Window | None) -> bool:
    """Not by equality: a loss that is no number equals nothing."""
    return known is not None and (window.generation, window.at) == (known.generation, known.at)


def _with_window(progress: Progress, window: wire.Window | None) -> Progress:
    if window is None or window.rank != 0 or _same(window, progress.window):
        return progress
    trend = progress.trend
    if window.samples_per_s is not None:
        trend = (*trend, window.samples_per_s)[-TREND_WINDOWS:]
    newest = max(progress.newest, window.step)
    return dataclasses.replace(progress, window=window, trend=trend, newest=newest)
