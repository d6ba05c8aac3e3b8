"""An elastic job of one rank a worker, under dtp and under tuned torchrun; what its ranks note."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.launch import leave
from benchmarks.measure import BIN, HERE

SCRIPT = HERE / "scripts" / "recovery.py"
HANG_S = 60.0
TUNED = "keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=1,is_host=0"
STORE = (
    "import sys, time, torch.distributed as d\n"
    "store = d.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=True, wait_for_workers=False)\n"
    "time.sleep(1e6)\n"
)


@dataclass(frozen=True, slots=True)
class Note:
    """A step of a rank."""

    step: int
    pid: int
    at: float
    world: int


class Notes:
    """What the ranks wrote, by rank."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "notes"

    def read(self) -> dict[int, list[Note]]:
        found = {}
        for path in self.base.parent.glob("notes.*"):
            if path.suffix[1:].isdigit():
                rows = [line.split() for line in path.read_text().splitlines()]
                found[int(path.suffix[1:])] = [_note(row) for row in rows if len(row) == 4]
        return found

    def pids(self) -> set[int]:
        return {note.pid for notes in self.read().values() for note in notes}

    def clear(self) -> None:
        for path in self.base.parent.glob("notes.[0-9]*"):
            path.write_text("")

    def formed(self, world: int | None, *, without: set[int], within_s: float) -> float | None:
        """When the last rank of a new group of `world` (None: any) took its first step; the
        processes `without` are not of it. None: that did not happen in time."""
        deadline = time.time() + within_s
        while time.time() < deadline:
            if (at := self._first(world, without)) is not None:
                return at
            time.sleep(0.005)
        return None

    def _first(self, world: int | None, without: set[int]) -> float | None:
        fresh = {
            rank: [n for n in notes if n.pid not in without] for rank, notes in self.read().items()
        }
        sizes = {notes[-1].world for notes in fresh.values() if notes}
        for size in sizes if world is None else sizes & {world}:
            groups = [[n for n in notes if n.world == size] for notes in fresh.values()]
            there = [notes[0].at for notes in groups if notes]
            if len(there) == size:
                return max(there)
        return None


def _note(row: Sequence[str]) -> Note:
    return Note(int(row[0]), int(row[1]), float(row[2]), int(row[3]))


class Home:
    """A state folder; its controller and warm process serve one job after another."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "home"

    def close(self) -> None:
        leave(self.path)


class Dtp:
    """A job of the product as its users have it: the command line, a controller, agents."""

    def __init__(self, home: Home, nodes: str, script: Path = SCRIPT) -> None:
        folder = Path(tempfile.mkdtemp(dir=home.path.parent, prefix="job"))
        self.notes = Notes(folder)
        self._home, self._name = home.path, folder.name.replace("_", "-")
        self._env = {**os.environ, "DTP_HOME": str(self._home)}
        job = folder / "job.yaml"
        job.write_text(
            f"name: {self._name}\nnodes: {nodes}\n"
            f"workdir: {script.parent}\nrun: python {script.name}\n"
            f"resources: {{cpus: 0.25}}\nenv: {{BENCH_FILE: {self.notes.base}}}\n"
            "checkpoint: {every: 50 steps}\nretry: {on_errors: 1000}\n"
        )
        self._dtp("run", "--detach", str(job), check=True)

    def scale(self, workers: int) -> None:
        self._dtp("scale", self._name, str(workers), check=True)

    def gang(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._storage() / "gang.json").read_text())
        return found

    def event(self, name: str, after: float) -> float | None:
        """When the gang last told of such an event."""
        told = [e["at"] for e in self.gang()["events"] if e["name"] == name and e["at"] > after]
        return max(told, default=None)

    def storage(self) -> str:
        return self._storage().as_uri()

    def agent(self, *, leader: bool) -> int:
        """Process number of the leader's agent, or of another one."""
        gang = self.gang()
        others = [m["worker"] for m in gang["members"] if m["worker"] != gang["leader"]]
        worker = gang["leader"] if leader else others[0]
        claims = self._home.glob(f"workers/{self._storage().name}.*/w{worker}/claim")
        newest = max(claims, key=lambda path: path.stat().st_mtime)
        pid: int = json.loads(newest.read_text())["pid"]
        return pid

    def close(self) -> None:
        for verb in ("kill", "wait"):
            self._dtp(verb, self._name, check=False)

    def _storage(self) -> Path:
        """Of the newest job, which is this one."""
        gangs = self._home.glob("storage/jobs/*/gang.json")
        return max(gangs, key=lambda path: path.stat().st_mtime).parent

    def _dtp(self, *words: str, check: bool) -> None:
        subprocess.run([str(BIN / "dtp"), *words], env=self._env, check=check, capture_output=True)


class Torchrun:
    """c10d rendezvous with what makes it quick and keeps it alive: a store outside of all agents,
    which none of them shares, and short keep-alives."""

    def __init__(self, folder: Path, workers: int, script: Path = SCRIPT) -> None:
        self.notes = Notes(folder)
        self._script = script
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._store = subprocess.Popen([sys.executable, "-c", STORE, str(self._port)])
        self.agents = [self.join() for _ in range(workers)]

    def join(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                str(BIN / "torchrun"),
                *("--nnodes=1:4", "--nproc-per-node=1", "--max-restarts=1000"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self._port}"),
                *(f"--rdzv-conf={TUNED}", "--rdzv-id=bench", "--monitor-interval=0.1"),
                str(self._script),
            ],
            env={
                **os.environ,
                "BENCH_FILE": str(self.notes.base),
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self, agent: subprocess.Popen[bytes], number: int) -> None:
        """With its rank, as a lost machine would go; SIGTERM it passes on by itself."""
        with contextlib.suppress(psutil.Error):
            ranks = psutil.Process(agent.pid).children(recursive=True)
            agent.send_signal(number)
            if number == signal.SIGKILL:
                for rank in ranks:
                    rank.kill()
        self.agents.remove(agent)

    def close(self) -> None:
        for agent in [*self.agents]:
            self.kill(agent, signal.SIGKILL)
            agent.wait()
        self._store.kill()
        self._store.wait()


@contextlib.contextmanager
def running(start: Callable[[], Any]) -> Iterator[Any]:
    job = start()
    try:
        yield job
    finally:
        job.close()


def figures(seconds: Sequence[float]) -> dict[str, float | int | None]:
    """Median, 95th percentile, extremes and count."""
    if not seconds:
        return {"median": None, "p95": None, "min": None, "max": None, "n": 0}
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered), 4),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 4),
        "min": round(ordered[0], 4),
        "max": round(ordered[-1], 4),
        "n": len(ordered),
    }
