"""Promises about losses and gradients that are no numbers, kept by real ranks."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtp_trainer import wire
from dtp_trainer.checkpoints.heads import raise_generation, read_head
from dtp_trainer.options import CommHook, NonFinite, Options
from dtp_trainer.ranks.launcher import RankLauncher, RankSpec
from dtp_trainer.storage import FileStorage

SCRIPT = Path(__file__).parent / "scripts" / "guarded.py"
POLICY = json.dumps({"every_s": None, "every_steps": 5, "keep": 3})


class Job:
    """The ranks of one job, a generation after another; each notes (loss, weight) by step."""

    def __init__(self, folder: Path, launcher: RankLauncher) -> None:
        self.folder, self._launcher = folder, launcher
        self.storage = FileStorage(folder / "storage")
        self.err = ""
        folder.mkdir()

    async def run(self, world: int, **env: Any) -> list[int]:
        """The exit codes of the next generation."""
        generation = raise_generation(self.storage).generation
        shared = {
            "PATH": os.environ["PATH"],
            "NOTES": self.folder,
            "OMP_NUM_THREADS": 1,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            wire.Env.GENERATION: generation,
            wire.Env.STORAGE: self.storage.uri,
            wire.Env.CHECKPOINT: POLICY,
            **env,
        }
        ranks = [await self._start({**shared, "RANK": r, "LOCAL_RANK": r}) for r in range(world)]
        texts = asyncio.gather(*(rank.stderr.read() for rank in ranks))
        codes = await asyncio.wait_for(asyncio.gather(*(rank.wait() for rank in ranks)), 60)
        self.err = b"".join(await texts).decode()
        assert "Traceback" not in self.err, self.err
        return list(codes)

    async def _start(self, env: dict[Any, object]) -> Any:
        steps = self.folder / f"steps{env['RANK']}.jsonl"
        named = {str(key): str(value) for key, value in {**env, wire.Env.STEPS_FILE: steps}.items()}
        return await self._launcher.start(
            RankSpec((sys.executable, str(SCRIPT)), named, str(self.folder))
        )

    def curve(self, rank: int = 0, *, without: int = 0) -> dict[int, tuple[str, str]]:
        """Step → loss and first weight of its last execution; of one step the weight alone."""
        lines = (self.folder / f"rank{rank}.txt").read_text().splitlines()
        rows = [(int(step), loss, weight) for step, loss, weight in map(str.split, lines)]
        return {step: ("" if step == without else loss, weight) for step, loss, weight in rows}

    def executed(self) -> list[int]:
        lines = (self.folder / "rank0.txt").read_text().splitlines()
        return [int(line.split()[0]) for line in lines]

    def values(self) -> dict[str, float]:
        """The newest reported by rank 0."""
        lines = (self.folder / "steps0.jsonl").read_text().splitlines()
        records = [record for record in map(wire.parse_step, lines) if record]
        return {name: value for record in records for name, value in record.values.items()}

    def checkpoints(self) -> list[int]:
        return [entry.step for entry in read_head(self.storage).entries]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def zygotes() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dtp-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
async def launcher(zygotes: Path) -> AsyncIterator[RankLauncher]:
    async with RankLauncher(zygotes=zygotes, idle_s=5) as launcher:
        yield launcher


@pytest.fixture
def job(tmp_path: Path, launcher: RankLauncher) -> Job:
    return Job(tmp_path / "job", launcher)


@pytest.fixture
def reference(tmp_path: Path, launcher: RankLauncher) -> Job:
    return Job(tmp_path / "reference", launcher)


def training(**options: Any) -> dict[str, str]:
    """As a job file's `training:` reaches a rank."""
    return {str(wire.Env.OPTIONS): json.dumps(options)}


@pytest.mark.parametrize(
    ("world", "options"), [(1, {}), (2, {}), (2, {"accumulate": 3, "static_graph": True})]
)
async def test_stop_ends_all_ranks_at_the_step_and_names_the_rank(
    job: Job, world: int, options: dict[str, Any]
) -> None:
    """No checkpoint is made of it, and the weights of the step before are the last ones."""
    bad = f"{world - 1}:7"
    assert await job.run(world, BAD=bad, **training(non_finite="stop", **options)) == [1] * world
    line = f"dtp: step 7: the loss of rank {world - 1} is NaN; the weights are untouched"
    assert job.err.count(line) == world
    assert job.checkpoints() == [5]
    assert job.executed() == list(range(1, 7))


@pytest.mark.parametrize("mode", ["skip", "rollback"])
@pytest.mark.parametrize("world", [1, 2])
async def test_a_step_that_is_left_out_leaves_no_trace(
    job: Job, reference: Job, world: int, mode: str
) -> None:
    """Losses and weights equal, to the bit, those of a run that computed nothing in the step:
    dropout, running statistics and the schedule included."""
    assert await reference.run(world, LEAVE_OUT="7") == [0] * world
    assert await job.run(world, BAD=f"{world - 1}:7", **training(non_finite=mode)) == [0] * world
    for rank in range(world):
        assert job.curve(rank, without=7) == reference.curve(rank, without=7)
    assert math.isfinite(float(job.curve()[20][0]))
    assert job.values()["skipped"] == 1
    redone = [6] if mode == "rollback" else []
    assert job.executed() == [*range(1, 8), *redone, *([7] if redone else []), *range(8, 21)]


@pytest.mark.parametrize(
    ("shard", "mode"),
    [("optimizer", "skip"), ("optimizer", "rollback"), ("everything", "rollback")],
)
async def test_sharded_ranks_leave_the_same_step_out(
    job: Job, reference: Job, shard: str, mode: str
) -> None:
    """Though each rank holds other gradients or states: clipping and norm are of all together."""
    options = {"shard": shard, "clip_grad_norm": 1.0}
    assert await reference.run(2, LEAVE_OUT="7", **training(**options)) == [0, 0]
    env = training(**options, non_finite=mode)
    assert await job.run(2, BAD="1:7", ONLY_THE_LOSS=1, **env) == [0, 0]
    assert job.curve(without=7) == reference.curve(without=7)
    assert job.values()["skipped"] == 1


async def test_a_loss_with_finite_gradients_on_one_rank_is_seen_by_all(job: Job) -> None:
    """A NaN that is added to a loss changes no gradient; still no rank takes the step."""
    env = training(non_finite="skip")
    assert await job.run(2, BAD="1:7", ONLY_THE_LOSS=1, **env) == [0, 0]
    assert "dtp: step 7: the loss of rank 1 is NaN; its update is left out (1 so far)" in job.err
    assert job.curve()[7][1] == job.curve()[6][1]


async def test_a_later_resume_leaves_out_what_was_left_out(job: Job, reference: Job) -> None:
    """A pause between the return to a checkpoint and the end of the job changes no loss."""
    env = training(non_finite="rollback")
    assert await reference.run(2, LEAVE_OUT="7 12") == [0, 0]
    assert await job.run(2, BAD="1:7", ASK="0:8", **env) == [75, 75]
    assert await job.run(2, BAD="1:7 0:12", ASK="1:14", **env) == [75, 75]
    assert await job.run(2, **env) == [0, 0]
    assert job.curve() == reference.curve()
    assert job.values()["skipped"] == 2


async def test_before_the_first_checkpoint_a_step_is_only_left_out(
    job: Job, reference: Job
) -> None:
    """There is nothing to go back to, and the weights are sound."""
    assert await reference.run(2, LEAVE_OUT="3") == [0, 0]
    assert await job.run(2, BAD="1:3", **training(non_finite="rollback")) == [0, 0]
    assert job.curve(without=3) == reference.curve(without=3)


@pytest.mark.parametrize(
    ("mode", "first", "words"),
    [
        ("skip", 7, "so were the 10 steps before it"),
        ("rollback", 7, "after 3 returns to the checkpoint of step 5"),
        ("rollback", 1, "so were the 10 steps before it"),
    ],
)
async def test_leniency_ends(job: Job, mode: str, first: int, words: str) -> None:
    """A job whose every step is unsound is ended with a line that says so."""
    env = {"BAD": " ".join(f"0:{step}" for step in range(first, 21)), **training(non_finite=mode)}
    if first == 1:
        env[str(wire.Env.CHECKPOINT)] = "{}"
    assert await job.run(1, **env) == [1]
    assert words in job.err.splitlines()[-1]


def test_what_cannot_be_undone_is_refused() -> None:
    """PowerSGD remembers gradients of steps that would be left out."""
    with pytest.raises(ValueError, match=r"^non_finite: skip cannot undo"):
        Options(comm_hook=CommHook.POWERSGD, non_finite=NonFinite.SKIP)


async def test_an_overflow_of_scaled_gradients_is_left_to_the_scaler(job: Job) -> None:
    """With fp16 a NaN loss is still found, and its step does not change the scale."""
    env = training(non_finite="skip", precision="fp16")
    assert await job.run(2, BAD="1:7", **env) == [0, 0]
    assert job.values()["skipped"] == 1
    assert all(math.isfinite(float(job.curve()[step][0])) for step in range(8, 21))
