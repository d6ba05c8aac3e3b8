"""Step records of a worker's ranks → windows of about a second. Reading files apart, pure."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dtp_trainer.wire import Spread, Step, Window, parse_step

TRUNCATE_AT_BYTES = 16 << 20


class StepTail:
    """Reads a growing step file from where it stopped; `opened` once its rank has made it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    @property
    def opened(self) -> bool:
        return self._path.exists()

    def read(self) -> list[Step]:
        """The records that were completed since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if self._offset > TRUNCATE_AT_BYTES and not self._rest:
            self._truncate()
        steps = (parse_step(line.decode("utf-8", "replace")) for line in whole)
        return [step for step in steps if step is not None]

    def _truncate(self) -> None:
        """Ranks append, so what is read can go; a record written this very moment is lost."""
        if self._path.stat().st_size == self._offset:
            os.truncate(self._path, 0)
            self._offset = 0


@dataclass(slots=True)
class _Lap:
    """What one rank did in a window."""

    steps: list[Step] = field(default_factory=list)

    @property
    def timed(self) -> list[Step]:
        """A record without seconds adds values to a step that was already told."""
        return [step for step in self.steps if step.seconds]

    def mean_seconds(self) -> dict[str, float]:
        timed = self.timed
        names = {name for step in timed for name in step.seconds}
        return {
            name: sum(step.seconds.get(name, 0.0) for step in timed) / len(timed) for name in names
        }


class Folder:
    """Collects the steps of one worker's ranks in one generation."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._laps: dict[int, _Lap] = {}
        self.last: dict[int, int] = {}
        """Rank → its last completed step; less than before when it went back to a checkpoint."""
        self.phases: dict[str, dict[str, float]] = {}
        """Name of a rank → phase → mean seconds a step in the newest window."""

    def add(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self._laps.setdefault(step.rank, _Lap()).steps.append(step)
            self.last[step.rank] = step.step

    def fold(self) -> Window | None:
        """All steps since the last call; None when there were none."""
        laps, self._laps = self._laps, {}
        if not laps:
            return None
        means = {rank: lap.mean_seconds() for rank, lap in laps.items()}
        self.phases = {
            str(rank): {name: measured(seconds) for name, seconds in mean.items()}
            for rank, mean in means.items()
            if mean
        }
        return fold(self._worker, laps[min(laps)].steps, list(means.values()))


def fold(worker: int, steps: Sequence[Step], phases: Sequence[dict[str, float]]) -> Window:
    """`steps` of the lowest rank, in order, at least one; `phases`: mean seconds of every rank."""
    last = steps[-1]
    timed = [step for step in steps if step.seconds]
    values = {name: value for step in steps for name, value in step.values.items()}
    return Window(
        at=last.at,
        generation=last.generation,
        worker=worker,
        rank=last.rank,
        world_size=last.world_size,
        step=last.step,
        steps=len(timed),
        epoch=last.epoch,
        total_steps=last.total_steps,
        values=values,
        samples_per_s=_rate(timed, [step.samples for step in timed]),
        tokens_per_s=_rate(timed, [step.tokens for step in timed if step.tokens is not None]),
        phases=_spreads(phases),
    )


def _rate(timed: Sequence[Step], amounts: Sequence[int]) -> float | None:
    """Of the whole job: what its steps held over the wall time they took."""
    seconds = sum(step.seconds.get("step", 0.0) for step in timed)
    return measured(sum(amounts) / seconds) if seconds > 0 and any(amounts) else None


def _spreads(phases: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    names = sorted({name for seconds in phases for name in seconds})
    return {name: _spread([p[name] for p in phases if name in p]) for name in names}


def _spread(values: Sequence[float]) -> dict[str, float]:
    found = (min(values), statistics.median(values), max(values))
    return asdict(Spread(*map(measured, found)))


def measured(value: float) -> float:
    """No clock knows more than six digits."""
    return float(f"{value:.6g}")
