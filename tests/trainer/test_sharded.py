"""Promises of sharded training: the same losses, a part of the memory, any world size after."""

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
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dtp_trainer import wire
from dtp_trainer.checkpoints.checkpoint import load
from dtp_trainer.checkpoints.heads import raise_generation, read_head
from dtp_trainer.ranks.launcher import RankLauncher, RankProcess, RankSpec
from dtp_trainer.session.zero1 import _Shelf, deal
from dtp_trainer.storage import FileStorage

SCRIPT = Path(__file__).parent / "scripts" / "blocks.py"
POLICY = json.dumps({"every_s": None, "every_steps": 4, "keep": 9})
STEPS = 15
SHARDS = ["optimizer", "everything"]


class Job:
    """The ranks of one job, a generation after another."""

    def __init__(self, folder: Path, launcher: RankLauncher) -> None:
        self.folder, self._launcher = folder, launcher
        self.storage = FileStorage(folder / "storage")
        self.err = ""
        folder.mkdir()

    async def run(self, world: int, shard: str = "nothing", **env: Any) -> list[int]:
        """The exit codes of the next generation."""
        options = {"shard": shard, **env.pop("options", {})}
        shared = {
            "PATH": os.environ["PATH"],
            "NOTES": self.folder,
            "OMP_NUM_THREADS": 1,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            wire.Env.GENERATION: raise_generation(self.storage).generation,
            wire.Env.STORAGE: self.storage.uri,
            wire.Env.CHECKPOINT: POLICY,
            wire.Env.OPTIONS: json.dumps(options),
            **env,
        }
        ranks = [await self._start({**shared, "RANK": r, "LOCAL_RANK": r}) for r in range(world)]
        texts = asyncio.gather(*(rank.stderr.read() for rank in ranks))
        codes = await asyncio.wait_for(asyncio.gather(*(rank.wait() for rank in ranks)), 120)
        self.err = b"".join(await texts).decode()
        assert "Traceback" not in self.err, self.err
        return list(codes)

    async def _start(self, env: dict[Any, object]) -> RankProcess:
        named = {str(key): str(value) for key, value in env.items()}
        return await self._launcher.start(
            RankSpec((sys.executable, str(SCRIPT)), named, str(self.folder))
        )

    def losses(self) -> dict[int, list[str]]:
        """Step → the loss of each rank, to the bit, in its last execution."""
        found: dict[int, dict[str, str]] = {}
        for path in sorted(self.folder.glob("rank*.txt")):
            for line in path.read_text().splitlines():
                step, loss, *_ = line.split()
                found.setdefault(int(step), {})[path.stem] = loss
        return {step: list(ranks.values()) for step, ranks in sorted(found.items())}

    def curve(self) -> list[float]:
        """The loss of the global batch, by step."""
        lines = (self.folder / "rank0.txt").read_text().splitlines()
        by_step = {int(line.split()[0]): float(line.split()[2]) for line in lines}
        return [by_step[step] for step in sorted(by_step)]

    def held(self) -> list[tuple[int, int]]:
        """Elements of optimizer state and of parameters, by rank."""
        lines = [line.split() for line in self.err.splitlines() if line.startswith("holds")]
        return [(int(states), int(weights)) for _, states, weights in lines]

    def kept(self) -> Any:
        """The newest checkpoint, whole."""
        return load(self.storage, read_head(self.storage).entries[-1].name).shared


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(map(lambda x, y: math.isclose(x, y, rel_tol=2e-5), a, b))


@pytest.fixture(scope="module")
def zygotes() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dtp-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
async def launcher(zygotes: Path) -> AsyncIterator[RankLauncher]:
    async with RankLauncher(zygotes=zygotes, idle_s=5) as launcher:
        yield launcher


@pytest.mark.parametrize(("world", "by_hand"), [(1, ""), (2, "1"), (3, "")])
async def test_sharded_losses_are_those_of_plain_ddp(
    tmp_path: Path, launcher: RankLauncher, world: int, by_hand: str
) -> None:
    """One, two and three ranks compute with either sharding what DDP computes, whether the script
    calls `optimize` or its own `zero_grad`, `backward` and `step`."""
    jobs = {shard: Job(tmp_path / shard, launcher) for shard in ("nothing", *SHARDS)}
    for shard, job in jobs.items():
        assert await job.run(world, shard, BY_HAND=by_hand) == [0] * world, job.err
        assert len(job.losses()) == STEPS
    assert jobs["optimizer"].losses() == jobs["nothing"].losses()
    assert close(jobs["everything"].curve(), jobs["nothing"].curve())


@pytest.mark.parametrize("kind", ["adamw", "adagrad"])
async def test_a_rank_holds_its_part_of_the_state(
    tmp_path: Path, launcher: RankLauncher, kind: str
) -> None:
    """Of three ranks each holds about a third of the optimizer's state, with `everything` of the
    weights too, whether the state appears with the first step or was there before."""
    held = {}
    for shard in ("nothing", *SHARDS):
        job = Job(tmp_path / shard, launcher)
        assert await job.run(3, shard, KIND=kind, STEPS=2) == [0, 0, 0], job.err
        held[shard] = job.held()
    (states, weights), *others = held["nothing"]
    assert others == [(states, weights)] * 2
    for shard in SHARDS:
        assert sum(states for states, _ in held[shard]) == states
        assert max(states for states, _ in held[shard]) < 0.45 * states
    assert [weights for _, weights in held["optimizer"]] == [weights] * 3
    assert max(weights for _, weights in held["everything"]) < 0.45 * weights


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
async def test_pauses_leave_every_loss_as_it_was(
    tmp_path: Path, launcher: RankLauncher, shard: str
) -> None:
    """At the same number of ranks a paused job has the losses of an unbroken one to the bit;
    dropout and batch norm included."""
    calm, job = Job(tmp_path / "calm", launcher), Job(tmp_path / "job", launcher)
    assert await calm.run(3, shard) == [0] * 3, calm.err
    assert await job.run(3, shard, ASK="1:3") == [75] * 3, job.err
    assert await job.run(3, shard, ASK="0:9 2:9") == [75] * 3, job.err
    assert await job.run(3, shard, SEED=8) == [0] * 3, job.err
    assert job.losses() == calm.losses()


@pytest.mark.slow
async def test_a_job_goes_on_with_any_sharding_on_any_number_of_ranks(
    tmp_path: Path, launcher: RankLauncher
) -> None:
    """Through nine changes of both, to and from each sharding, losses and weights are those of one
    rank that was never paused; what the ranks were seeded with does not matter."""
    calm, job = Job(tmp_path / "calm", launcher), Job(tmp_path / "job", launcher)
    shared = {"CALM": 1, "STEPS": 40}
    assert await calm.run(1, **shared) == [0], calm.err
    ways = ["nothing 2", "optimizer 3", "everything 2", "nothing 1", "everything 3"]
    ways += ["optimizer 1", "optimizer 2", "everything 1", "nothing 3"]
    for number, (shard, world) in enumerate((way.split() for way in ways), start=7):
        codes = await job.run(int(world), shard, **shared, SEED=number, ASK="first", PACE=0.01)
        assert codes == [75] * int(world), job.err
    assert await job.run(2, "optimizer", **shared) == [0, 0], job.err
    assert close(job.curve(), calm.curve())
    weights = job.kept()["model"], calm.kept()["model"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
async def test_sharding_goes_with_parts_and_clipping(
    tmp_path: Path, launcher: RankLauncher, shard: str
) -> None:
    """Accumulation and clipping come to the same as without sharding."""
    options = {"accumulate": 2, "clip_grad_norm": 0.5}
    plain, job = Job(tmp_path / "plain", launcher), Job(tmp_path / "job", launcher)
    assert await plain.run(2, CALM=1, options=options) == [0, 0], plain.err
    assert await job.run(2, shard, CALM=1, options=options) == [0, 0], job.err
    assert close(job.curve(), plain.curve())


@pytest.mark.parametrize("shard", SHARDS)
async def test_half_precision_agrees_on_every_step(
    tmp_path: Path, launcher: RankLauncher, shard: str
) -> None:
    """With fp16 all ranks leave out the same steps, and the losses stay near those of fp32."""
    plain, job = Job(tmp_path / "plain", launcher), Job(tmp_path / "job", launcher)
    assert await plain.run(2, CALM=1, options={"precision": "fp16"}) == [0, 0], plain.err
    assert await job.run(2, shard, CALM=1, options={"precision": "fp16"}) == [0, 0], job.err
    apart = [abs(a - b) for a, b in zip(job.curve(), plain.curve(), strict=True)]
    assert max(apart) < 0.05


@pytest.mark.parametrize("shard", SHARDS)
async def test_what_cannot_be_sharded_is_said_in_one_line(
    tmp_path: Path, launcher: RankLauncher, shard: str
) -> None:
    """An optimizer that steps all parameters together ends the script before its first step."""
    job = Job(tmp_path / "job", launcher)
    assert await job.run(2, shard, KIND="lbfgs") == [1, 1]
    assert len(set(job.err.splitlines())) == 1
    assert f"dtp: training.shard: {shard} needs an optimizer that steps each" in job.err


@pytest.mark.parametrize("shard", SHARDS)
async def test_the_file_of_one_rank_is_not_enough(
    tmp_path: Path, launcher: RankLauncher, shard: str
) -> None:
    """A checkpoint whose pieces are damaged is named, and the one before it is used."""
    job = Job(tmp_path / "job", launcher)
    assert await job.run(2, shard, ASK="0:6") == [75, 75], job.err
    newest = read_head(job.storage).entries[-1]
    path = job.storage.root / "checkpoints" / newest.name / "rank-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    assert await job.run(2, shard) == [0, 0], job.err
    assert f"{newest.name}/rank-00001-of-00002.safetensors has sha256" in job.err
    assert "resumed from step 4" in job.err


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 90), max_size=9), max_size=3), st.integers(1, 5))
def test_parameters_are_dealt_evenly(groups: list[list[int]], world: int) -> None:
    """No rank has more than the least loaded one by more than the largest parameter."""
    owners = deal(groups, world)
    loads = [0] * world
    for sizes, ranks in zip(groups, owners, strict=True):
        for size, rank in zip(sizes, ranks, strict=True):
            loads[rank] += size
    assert max(loads) - min(loads) <= max((size for sizes in groups for size in sizes), default=0)


def test_what_one_owner_broadcasts_lies_side_by_side() -> None:
    """Parameters move into one buffer with their values and layouts, and what a script puts
    elsewhere later is taken in again."""
    nets = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(3, 5)
    parameters = [p for net in nets for p in net.parameters()]
    before = [(p.detach().clone(), p.stride()) for p in parameters]
    shelf = _Shelf(0, list(parameters))
    for parameter, (value, stride) in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.stride() == stride
        assert parameter.data_ptr() % 64 == 0
    parameters[2].data = torch.full((5, 3), 7.0)
    shelf.settle()
    shelf.memory.fill_(0)
    assert all(not p.any() for p in parameters)
