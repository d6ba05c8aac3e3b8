"""Promises of a session, kept by real ranks: forked, joined by gloo, asked to leave by SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtp_trainer import wire
from dtp_trainer.checkpoints.heads import raise_generation, read_head
from dtp_trainer.ranks.launcher import RankLauncher, RankProcess, RankSpec
from dtp_trainer.storage import FileStorage

SCRIPTS = Path(__file__).parent / "scripts"
STEPS, STEPS_AN_EPOCH, SAMPLES = 24, 12, 144
EVERY_5 = {"every_s": None, "every_steps": 5, "keep": 3}
Notes = dict[int, dict[int, tuple[str, ...]]]


class Job:
    """The storage of one job, and the ranks started for it, one generation after another."""

    def __init__(self, folder: Path, launcher: RankLauncher, script: str = "learner.py") -> None:
        self.folder, self.launcher = folder, launcher
        self._script = SCRIPTS / script
        self.storage = FileStorage(folder / "storage")
        self.err = ""
        (folder / "notes").mkdir(parents=True)

    async def start(self, world: int, *, present: int | None = None, **env: Any) -> Started:
        """The next generation; only the first `present` ranks of it."""
        generation = raise_generation(self.storage).generation
        port = free_port()
        ranks = []
        for rank in range(world if present is None else present):
            variables = self._environment(rank, world, port, generation) | env
            spec = RankSpec(
                (sys.executable, str(self._script)),
                {key: str(value) for key, value in variables.items()},
                str(self.folder),
            )
            ranks.append(await self.launcher.start(spec))
        return Started(self, ranks, port)

    async def run(self, world: int, **env: Any) -> list[int]:
        """The exit codes of the next generation."""
        return await (await self.start(world, **env)).ended()

    def _environment(self, rank: int, world: int, port: int, generation: int) -> dict[str, object]:
        return {
            "PATH": os.environ["PATH"],
            "NOTES": self.folder / "notes",
            "OMP_NUM_THREADS": 1,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            wire.Env.JOB_ID: "job",
            wire.Env.ATTEMPT: 1,
            wire.Env.GENERATION: generation,
            wire.Env.STORAGE: self.storage.uri,
            wire.Env.STEPS_FILE: self.folder / f"steps{rank}.jsonl",
            wire.Env.CHECKPOINT: json.dumps(EVERY_5),
        }

    def notes(self) -> Notes:
        """Step → rank → (loss, average, sample ids) of its last execution."""
        found: Notes = {}
        for path in sorted((self.folder / "notes").glob("rank*.txt")):
            for line in path.read_text().splitlines():
                step, *rest = line.split()
                found.setdefault(int(step), {})[int(path.stem[4:])] = tuple(rest)
        return found

    def last_steps(self) -> list[int]:
        """Of each rank, by its notes."""
        paths = sorted((self.folder / "notes").glob("rank*.txt"))
        return [int(path.read_text().splitlines()[-1].split()[0]) for path in paths]

    def records(self, rank: int) -> list[wire.Step]:
        lines = (self.folder / f"steps{rank}.jsonl").read_text().splitlines()
        return [record for record in map(wire.parse_step, lines) if record]

    def checkpoints(self) -> list[int]:
        return [entry.step for entry in read_head(self.storage).entries]


class Started:
    """The ranks of one generation."""

    def __init__(self, job: Job, ranks: Sequence[RankProcess], port: int) -> None:
        self._job, self._ranks, self.port = job, ranks, port

    def ask(self, rank: int) -> None:
        """To checkpoint and leave."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._ranks[rank].pid, 15)

    async def ended(self) -> list[int]:
        texts = asyncio.gather(*(rank.stderr.read() for rank in self._ranks))
        codes = await asyncio.wait_for(asyncio.gather(*(r.wait() for r in self._ranks)), 60)
        self._job.err = b"".join(await texts).decode()
        return list(codes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(ready: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


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


@pytest.mark.parametrize("world", [2, 3])
async def test_three_pauses_leave_every_loss_as_it_was(
    tmp_path: Path, job: Job, world: int
) -> None:
    """At the same world size all losses are equal to the bit: dropout, batch norm, random data,
    schedule and the script's own state included."""
    calm = Job(tmp_path / "calm", job.launcher)
    assert await calm.run(world) == [0] * world
    for asked in ("0:3", "1:9", "0:16 1:16"):
        assert await job.run(world, ASK=asked, PACE="0.02") == [75] * world
        assert len(set(job.last_steps())) == 1
    assert await job.run(world) == [0] * world
    assert job.notes() == calm.notes()
    assert sorted(job.notes()) == list(range(1, STEPS + 1))


async def test_every_sample_comes_once_an_epoch_at_any_world_size(job: Job) -> None:
    """2 → 1 → 3 ranks, changed in the middle of epochs, never lose a sample nor see one twice."""
    assert await job.run(2, ASK="1:6", PACE="0.02") == [75, 75]
    assert await job.run(1, ASK="0:15", PACE="0.02") == [75]
    assert await job.run(3) == [0, 0, 0]
    assert all(step % STEPS_AN_EPOCH for step in job.checkpoints()[-3:-1])
    seen = [Counter[str]() for _ in range(STEPS // STEPS_AN_EPOCH)]
    for step, ranks in job.notes().items():
        for _, _, ids in ranks.values():
            seen[(step - 1) // STEPS_AN_EPOCH].update(ids.split(","))
    assert all(epoch == Counter(map(str, range(SAMPLES))) for epoch in seen)


@pytest.mark.parametrize("apart_s", [0.0, 0.02, 0.1])
async def test_ranks_asked_at_different_moments_leave_after_one_step(
    job: Job, apart_s: float
) -> None:
    """However far apart the signals are, all ranks leave after the same step, which is kept."""
    ranks = await job.start(2, PACE="0.01")
    await until(lambda: len(job.notes()) > 2)
    ranks.ask(1)
    await asyncio.sleep(apart_s)
    ranks.ask(0)
    assert await ranks.ended() == [75, 75]
    assert len(set(job.last_steps())) == 1
    assert job.checkpoints()[-1] == job.last_steps()[0]


async def test_a_rank_that_hears_nothing_leaves_with_the_others(job: Job) -> None:
    """A script that ignores SIGTERM on one rank leaves with 75 on all when another one hears it."""
    assert await job.run(2, ASK="0:4", DEAF="1") == [75, 75]
    assert len(set(job.last_steps())) == 1


async def test_a_rank_that_waits_for_others_leaves_at_once(job: Job) -> None:
    """SIGTERM while a rank waits in vain for the others ends it with 75 and no checkpoint."""
    ranks = await job.start(2, present=1)
    await until(lambda: listening(ranks.port))
    ranks.ask(0)
    assert await ranks.ended() == [75]
    assert job.checkpoints() == []


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_leaving_before_the_first_step_keeps_nothing(job: Job) -> None:
    """A rank asked between its start and its first step leaves with all others, and the resume
    point stays what it was."""
    assert await job.run(2, ASK="0:6") == [75, 75]
    kept = job.checkpoints()
    assert await job.run(2, ASK="1:start") == [75, 75]
    assert job.checkpoints() == kept
    assert job.last_steps() == [kept[-1]] * 2


async def test_a_finished_job_is_kept_and_stays_finished(job: Job) -> None:
    """The last step is in a checkpoint; starting again takes no step and ends with 0."""
    assert await job.run(1) == [0]
    assert job.checkpoints()[-1] == STEPS
    kept = job.checkpoints()
    assert await job.run(1) == [0]
    assert job.checkpoints() == kept
    assert f"dtp: resumed from step {STEPS} of generation 1" in job.err.splitlines()
    assert len(job.notes()) == STEPS


async def test_a_checkpoint_has_the_values_of_its_own_step(job: Job) -> None:
    """Not of the one before: what `keep_best` goes by belongs to the weights beside it."""
    assert await job.run(1) == [0]
    losses = {record.step: record.values["loss"] for record in job.records(0) if record.seconds}
    entries = read_head(job.storage).entries
    assert len(entries) == 3
    assert all(entry.values["loss"] == losses[entry.step] for entry in entries)


async def test_each_rank_reports_each_step_once(job: Job) -> None:
    """A record a step and rank; NaN stays NaN; what was logged last has a record of its own."""
    assert await job.run(2) == [0, 0]
    for rank in (0, 1):
        *steps, last = job.records(rank)
        assert [record.step for record in steps] == list(range(1, STEPS + 1))
        assert (last.step, dict(last.values), dict(last.seconds)) == (STEPS, {"final": 1.0}, {})
        assert [s.step for s in steps if s.values["loss"] != s.values["loss"]] == [3]
        assert {s.total_steps for s in steps} == {STEPS}
        assert steps[5].samples == 12
        assert steps[5].epoch == 0.5
        assert steps[5].seconds["step"] >= steps[5].seconds["data"] > 0
        assert "checkpoint" in steps[4].seconds


@pytest.mark.parametrize(
    ("change", "words"), [({"BATCH": 16}, "global_batch was 12"), ({"WIDTH": 8}, "model")]
)
async def test_a_checkpoint_that_does_not_fit_ends_the_script_in_one_line(
    job: Job, change: dict[str, Any], words: str
) -> None:
    """Another batch or another model than the checkpoint's is said in one line, not resumed."""
    assert await job.run(1, ASK="0:6") == [75]
    assert await job.run(1, **change) == [1]
    (line,) = [line for line in job.err.splitlines() if "resumed" not in line]
    assert line.startswith("dtp: ")
    assert words in line


async def test_state_that_cannot_be_kept_is_said_after_the_first_step(job: Job) -> None:
    """Not at the pause: the script ends with one line that names it."""
    assert await job.run(1, ODD="1") == [1]
    (line,) = job.err.splitlines()
    assert line.startswith("dtp: ")
    assert "odd" in line
    assert job.last_steps() == [1]


@pytest.mark.parametrize("asked", ["0:2", ""])
async def test_what_could_not_be_kept_is_no_success(job: Job, small_disk: Path, asked: str) -> None:
    """On a full disk neither a pause nor the end of the training pretends to have a checkpoint."""
    job.storage = FileStorage(small_disk)
    assert await job.run(2, ASK=asked, WIDTH=40_000) == [1, 1]
    assert job.checkpoints() == []
    assert "could not be kept" in job.err
    assert "Traceback" not in job.err


async def test_ranks_of_an_older_generation_leave_without_a_trace(job: Job) -> None:
    """Once a newer generation owns the job, a commit is refused and all ranks leave with 78."""
    ranks = await job.start(2, PACE="0.01")
    await until(lambda: len(job.notes()) > 2)
    kept = job.checkpoints()
    raise_generation(job.storage)
    assert await ranks.ended() == [78, 78]
    assert job.checkpoints() == kept


async def test_a_loop_of_ones_own_pauses_and_resumes(
    tmp_path: Path, launcher: RankLauncher
) -> None:
    """Without `session.batches`, `global_step` says where to go on, and samples what was told."""
    job = Job(tmp_path / "own", launcher, "own_loop.py")
    assert await job.run(2, ASK="1:4") == [75, 75]
    assert await job.run(2) == [0, 0]
    for rank in (0, 1):
        lines = (job.folder / "notes" / f"rank{rank}.txt").read_text().splitlines()
        assert [int(line.split()[0]) for line in lines] == list(range(1, 12))
        assert {(r.samples, r.tokens, r.total_steps) for r in job.records(rank)} == {(7, 70, None)}
    assert job.checkpoints()[-1] == 11


async def test_a_session_outside_dtp_trains_and_keeps_nothing(job: Job) -> None:
    """Under plain Python the same script trains to its end and writes no file of ours."""
    own = dict.fromkeys((wire.Env.STORAGE, wire.Env.STEPS_FILE, wire.Env.CHECKPOINT), "")
    assert await job.run(1, **own, RANK="", WORLD_SIZE="", MASTER_ADDR="") == [0]
    assert len(job.notes()) == STEPS
    assert job.checkpoints() == []
    assert not list(job.folder.glob("steps*"))


@pytest.mark.slow
async def test_a_script_that_ends_right_after_its_last_step_ends(
    tmp_path: Path, launcher: RankLauncher
) -> None:
    """Destroying the process group does not wait for a thread that waits for the interpreter."""
    script = Path(__file__).parents[2] / "examples" / "upgrade" / "before.py"
    job = Job(tmp_path / "brief", launcher, str(script))
    for _ in range(12):
        async with asyncio.timeout(30):
            assert await job.run(2) == [0, 0]
