"""Real agents as processes on loopback, each with its own folder; nothing may be left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtp_trainer import wire

SCRIPT = '''
"""Takes steps and reports them, obeys SIGTERM at the next step; misbehaves as it is told."""
import argparse, json, os, signal, sys, time
p = argparse.ArgumentParser()
p.add_argument("--steps", type=int, default=20)
p.add_argument("--fail", default="")  # rank:step:generations
p.add_argument("--hang", default="")
p.add_argument("--deaf", action="store_true")
a = p.parse_args()
env = os.environ
rank, world, generation = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["DTP_GENERATION"])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("world", world, "generation", generation, flush=True)
def due(what, step):
    if not what:
        return False
    who, when, upto = map(int, what.split(":"))
    return rank == who and step == when and generation <= upto
with open(env["DTP_STEPS_FILE"], "a", buffering=1) as file:
    for step in range(1, a.steps + 1):
        time.sleep(0.03)
        if due(a.fail, step):
            raise ValueError(f"bad batch {step}")
        while due(a.hang, step):
            time.sleep(1)
        record = dict(at=time.time(), generation=generation, rank=rank, world_size=world,
            step=step, epoch=0.0, total_steps=a.steps, samples=8, tokens=None,
            values={"loss": 1 / step}, seconds={"step": 0.03, "data": 0.003})
        file.write(json.dumps(record) + chr(10))
        if asked and not a.deaf:
            sys.exit(75)
'''


class Worker:
    """An agent and its folder."""

    def __init__(self, number: int, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.number, self.folder, self.process = number, folder, process

    def log(self) -> list[wire.Record | wire.Text]:
        """Everything that it printed; a line that nobody can read fails the test."""
        lines = (self.folder / "log").read_text().split("\n")[:-1]
        parsed = [wire.parse(line) for line in lines]
        assert all(parsed), [line for line, found in zip(lines, parsed, strict=True) if not found]
        return [record for record in parsed if record]

    def texts(self) -> list[str]:
        return [line.text for line in self.log() if isinstance(line, wire.Text)]

    def windows(self) -> list[wire.Window]:
        return [record for record in self.log() if isinstance(record, wire.Window)]

    def exit(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / wire.EXIT_FILE).read_text())
        return found

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that its agent has started."""
        files = (self.folder / "scratch" / wire.RANKS_FOLDER).glob("*.json")
        return [json.loads(file.read_text())["pid"] for file in files]

    def ended(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)

    def ask(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)


class Job:
    """A job on this machine without an engine: launches workers, reads their gang."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = f"j{os.urandom(4).hex()}"
        self.workers: list[Worker] = []
        self.storage = folder / "storage"
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        (self.work / "train.py").write_text(SCRIPT)
        self.options: dict[str, Any] = {}

    def launch(self, *numbers: int, **options: Any) -> list[Worker]:
        new = [self._launch(number, {**self.options, **options}) for number in numbers]
        self.workers += new
        return new

    def train(self, workers: int, *args: str, **options: Any) -> list[Worker]:
        """So many workers that run the script with these arguments."""
        self.options = {"command": ["python", "train.py", *args], "workers": workers, **options}
        return self.launch(*range(workers))

    def _launch(self, number: int, options: dict[str, Any]) -> Worker:
        attempt = options.get("attempt", 1)
        folder = self.folder / f"a{attempt}" / f"w{number}"
        (folder / "scratch").mkdir(parents=True, exist_ok=True)
        given = wire.Launch(**{**self._defaults(folder), "worker": number, **options})
        (folder / "launch.json").write_bytes(wire.encode_object(given))
        return Worker(number, folder, self.spawn(folder))

    def spawn(self, folder: Path) -> subprocess.Popen[bytes]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "dtp_trainer.agent"],
                env={**os.environ, "PATH": path, wire.Env.LAUNCH: str(folder / "launch.json")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _defaults(self, folder: Path) -> dict[str, Any]:
        return {
            "job_id": self.id,
            "job_name": "job",
            "attempt": 1,
            "storage": self.storage.as_uri(),
            "secret": "secret",
            "workdir": str(self.work),
            "scratch": str(folder / "scratch"),
            "setup": None,
            "env": {"DTP_NO_ZYGOTE": "1"},
            "nproc_per_node": 1,
            "min_workers": 1,
            "max_workers": 4,
            "host": "127.0.0.1",
            "grace_s": 10.0,
            "error_budget": 3,
            "hang_budget": 2,
            "start_within_s": 30.0,
            "no_step_for_s": None,
            "train_until": None,
            "checkpoint": {},
            "data": {},
            "zygotes": str(self.folder / "zygotes"),
            "zygote_idle_s": 1.0,
        }

    def gang(self) -> wire.Gang | None:
        try:
            found: wire.Gang = wire.Gang.from_dict(
                json.loads((self.storage / wire.GANG_KEY).read_text())
            )
        except FileNotFoundError:
            return None
        return found

    def story(self) -> list[str]:
        gang = self.gang()
        return [event.name for event in gang.events] if gang else []

    def texts(self) -> list[str]:
        gang = self.gang()
        return [event.text for event in gang.events] if gang else []

    def until(self, ready: Callable[[], Any], timeout: float = 30) -> Any:
        """The first truthy answer of `ready`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := ready():
                return found
            time.sleep(0.01)
        logs = {w.number: (w.folder / "log").read_text()[-2000:] for w in self.workers}
        pytest.fail(f"not within {timeout} s; gang: {self.gang()}; logs: {logs}")

    def stepped(self, generation: int, world_size: int | None = None) -> bool:
        """Ranks of this generation, or a later one, have taken a step."""
        gang = self.gang()
        if gang is None or gang.generation < generation or gang.phase != wire.GangPhase.RUNNING:
            return False
        fresh = [w for worker in self.workers for w in worker.windows()[-1:]]
        reached = [w for w in fresh if w.generation == gang.generation and w.rank == 0]
        return bool(reached) and world_size in (None, gang.world_size)

    def codes(self) -> list[int]:
        return [worker.ended() for worker in self.workers]

    def processes(self) -> list[psutil.Process]:
        """All that runs for this job."""
        return [process for process in psutil.process_iter() if self._ours(process)]

    def _ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            env = process.environ()
            launch = env.get(wire.Env.LAUNCH, "")
            return env.get(wire.Env.JOB_ID) == self.id or launch.startswith(str(self.folder))
        return False


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """At the end, every agent must have left, and every process of the job with it."""
    job = Job(tmp_path / "job")
    yield job
    left = [worker.number for worker in job.workers if worker.process.poll() is None]
    for worker in job.workers:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()
    deadline = time.monotonic() + 5
    while (orphans := job.processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    lines = [process.cmdline() for process in orphans]
    for process in orphans:
        process.kill()
    assert not left, f"agents of workers {left} are still there"
    assert not lines, f"processes were left behind: {lines}"
