"""kill -9 of a rank, of an agent, of the leader → the first new step, beside torchrun (tuned) with
the same script in the same run.

`--kills N` for so many of each kind; by default as many as fit in about four minutes.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.elastic import HANG_S, Dtp, Home, Notes, Torchrun, figures, running
from benchmarks.measure import median, save

KILLS = {"rank": 60, "agent": 15, "leader": 15}
PEER_KILLS = {"rank": 8, "agent": 4}
AGENTS_A_JOB = 2
LOADS = 20
READY_S = 120.0


@dataclass(slots=True)
class Series:
    """Kills of one kind."""

    seconds: list[float] = field(default_factory=list)
    hangs: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**figures(self.seconds), "hangs": self.hangs}


def strike(notes: Notes, kill: Callable[[], None], series: Series) -> bool:
    """One kill, timed until a new group has stepped; False when none did."""
    before = notes.pids()
    notes.clear()
    killed = time.time()
    kill()
    formed = notes.formed(None, without=before, within_s=HANG_S)
    if formed is None:
        series.hangs += 1
        return False
    series.seconds.append(formed - killed)
    notes.clear()  # of what the old ranks wrote until they died
    return True


def slay(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def a_rank(notes: Notes, dice: random.Random) -> int:
    """The process of a rank that has just stepped."""
    newest = [rows[-1].pid for rows in notes.read().values() if rows]
    return dice.choice(newest)


def dtp(folder: Path, kinds: dict[str, int]) -> tuple[dict[str, Series], float]:
    """Ranks die in one job of two workers. Agents die in jobs of three, two in each: dtp replaces
    lost machines more and more slowly, which is not what is measured here."""
    found = {kind: Series() for kind in kinds}
    dice = random.Random(0)
    with running(lambda: Home(folder)) as home:
        for kind, kills in kinds.items():
            series, size, each = found[kind], 2, kills
            if kind != "rank":
                size, each = 3, AGENTS_A_JOB
            while len(series.seconds) + series.hangs < kills:
                with running(lambda size=size: Dtp(home, f"1..{size}")) as job:
                    one_job(job, kind, series, size, each, dice)
                    storage = job.storage()
        loads = load_times(storage)
    return found, median(loads)


def one_job(
    job: Dtp, kind: str, series: Series, size: int, kills: int, dice: random.Random
) -> None:
    if job.notes.formed(size, without=set(), within_s=READY_S) is None:
        series.hangs += 1
        return
    for _ in range(kills):
        whole = size if kind == "rank" else None
        if job.notes.formed(whole, without=set(), within_s=READY_S) is None:
            series.hangs += 1
            return
        time.sleep(dice.uniform(0.2, 0.6))
        victim = a_rank(job.notes, dice)
        if kind != "rank":
            victim = job.agent(leader=kind == "leader")
        if not strike(job.notes, lambda pid=victim: slay(pid), series):
            return


def load_times(storage: str) -> list[float]:
    """Of the checkpoint that each generation starts from."""
    from dtp_trainer.checkpoints.checkpoint import load_newest
    from dtp_trainer.storage import open_storage

    found = []
    for _ in range(LOADS):
        started = time.perf_counter()
        load_newest(open_storage(storage), rank=0, world_size=1)
        found.append(time.perf_counter() - started)
    return found


def torchrun(folder: Path, kinds: dict[str, int]) -> dict[str, Series]:
    """Several short series, because a hang ends one. An agent that was killed is started anew."""
    found = {kind: Series() for kind in kinds}
    dice = random.Random(0)
    for kind, kills in kinds.items():
        series = found[kind]
        while len(series.seconds) + series.hangs < kills:
            for old in folder.glob("notes*"):
                old.unlink()
            with running(lambda: Torchrun(folder, 2)) as job:
                while len(series.seconds) + series.hangs < kills and peer_kill(
                    job, kind, series, dice
                ):
                    pass
    return found


def peer_kill(job: Torchrun, kind: str, series: Series, dice: random.Random) -> bool:
    if job.notes.formed(2, without=set(), within_s=READY_S) is None:
        series.hangs += 1
        return False
    time.sleep(dice.uniform(0.2, 0.6))
    if kind == "rank":
        victim = a_rank(job.notes, dice)
        return strike(job.notes, lambda: slay(victim), series)
    agent = dice.choice(job.agents)
    if not strike(job.notes, lambda: job.kill(agent, signal.SIGKILL), series):
        return False
    job.agents.append(job.join())
    return True


def main() -> None:
    given = os.environ.get("BENCH_KILLS")
    kinds = dict.fromkeys(KILLS, int(given)) if given else KILLS
    with tempfile.TemporaryDirectory() as folder:
        ours, load_s = dtp(Path(folder), kinds)
    with tempfile.TemporaryDirectory() as folder:
        theirs = torchrun(Path(folder), PEER_KILLS)
    for name, series in (*ours.items(), *theirs.items()):
        print(name, len(series.seconds), "recoveries,", series.hangs, "hangs", file=sys.stderr)
    save(
        "recovery",
        {
            "kill_to_first_step_s": by_launcher("rank", ours, theirs),
            "agent_kill_to_first_step_s": by_launcher("agent", ours, theirs),
            "leader_kill_to_first_step_s": by_launcher("leader", ours, theirs),
            "of_which_checkpoint_load_s": load_s,
            "hangs": {"dtp": ours["rank"].hangs, "torchrun": theirs["rank"].hangs},
            "hangs_of_all_kinds": {"dtp": hangs(ours), "torchrun": hangs(theirs)},
            "ratio_to_torchrun": ratio(ours["rank"].seconds, theirs["rank"].seconds),
            "torchrun": "tuned; its store is hosted outside of all agents, because the death of "
            "the agent that hosts it ends the job",
            "goals": {"dtp median s": 0.5, "dtp hangs": 0},
        },
    )


def by_launcher(
    kind: str, ours: dict[str, Series], theirs: dict[str, Series]
) -> dict[str, dict[str, Any]]:
    found = {"dtp": ours.get(kind), "torchrun": theirs.get(kind)}
    return {name: series.to_dict() for name, series in found.items() if series is not None}


def hangs(found: dict[str, Series]) -> int:
    return sum(series.hangs for series in found.values())


def ratio(ours: list[float], theirs: list[float]) -> float | None:
    return round(median(ours) / median(theirs), 4) if ours and theirs else None
