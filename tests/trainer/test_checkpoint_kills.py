"""The promise that counts: kill -9 at any moment of a save, and the newest checkpoint loads."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtp_trainer.checkpoints import heads
from dtp_trainer.checkpoints.checkpoint import load_newest
from dtp_trainer.storage import FileStorage, Storage

AT_MOST_BYTES = 6 * 3_000_000
"""Two kept, one being written, one being given up, two half written when the last kill came."""

SCRIPT = Path(__file__).with_name("scripts") / "save_until_killed.py"


class Savers:
    """Starts savers one after the other, kills each, and remembers what it had committed."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), storage.uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.read() == "ready"
        self.committed = self.commits = 0

    def read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def run_and_kill(self, generation: int, *, commits: int = 0, after_s: float = 0.0) -> None:
        """Kill a saver a while after it has committed so many times."""
        assert self.process.stdin
        self.process.stdin.write(f"{generation}\n")
        self.process.stdin.flush()
        pid = None
        before = self.commits
        while pid is None or self.commits < before + commits:
            pid = self.take(self.read()) or pid
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
        while (line := self.read()) != "dead":
            assert line, "the parent of the savers died"
            self.take(line)

    def take(self, line: str) -> int | None:
        word, number = line.split()
        if word == "saver":
            return int(number)
        self.committed, self.commits = int(number), self.commits + 1
        return None

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(params=["files", pytest.param("s3", marks=pytest.mark.slow)])
def savers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Savers]:
    in_s3 = request.param == "s3"
    started = Savers(request.getfixturevalue("s3") if in_s3 else FileStorage(tmp_path))
    yield started
    started.close()


def kill_and_load(savers: Savers, kills: int) -> None:
    storage, moments = savers.storage, random.Random(kills)
    reached = 0
    for number in range(kills):
        generation = heads.raise_generation(storage).generation
        savers.run_and_kill(generation, commits=number % 2, after_s=moments.uniform(0, 0.12))
        loaded = load_newest(storage, world_size=2, on_damage=pytest.fail)
        if loaded is None:
            assert savers.committed == 0
            continue
        assert loaded.step >= max(savers.committed, reached)
        assert loaded.step == loaded.shared["step"]
        assert loaded.own
        for tensor in (*(loaded.shared[name] for name in "abc"), loaded.own["step"]):
            assert bool((tensor == loaded.step).all())
        reached = loaded.step
    assert reached > 0
    savers.run_and_kill(heads.raise_generation(storage).generation, commits=2)
    assert sum(entry.bytes for entry in storage.list()) < AT_MOST_BYTES
    if isinstance(storage, FileStorage):
        files = [path for path in storage.root.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < AT_MOST_BYTES


def test_eight_kills_at_random_moments(savers: Savers) -> None:
    """After each of 8 kills in the middle of saving, the newest checkpoint is whole and newest."""
    kill_and_load(savers, 8)


@pytest.mark.slow
@pytest.mark.parametrize("savers", ["files"], indirect=True)
def test_a_hundred_kills_at_random_moments(savers: Savers) -> None:
    """After each of 100 kills while it saves, the newest checkpoint is whole and newest."""
    kill_and_load(savers, 100)
