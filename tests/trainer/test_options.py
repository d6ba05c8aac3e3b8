"""Promises of `training:` options: what each computes beside the plain step, and that a job which
uses it may be interrupted."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtp_trainer import wire
from dtp_trainer.checkpoints.heads import raise_generation
from dtp_trainer.options import Compile, Options
from dtp_trainer.ranks.launcher import RankLauncher, RankProcess, RankSpec
from dtp_trainer.session import Session, parallel
from dtp_trainer.storage import FileStorage

SCRIPT = Path(__file__).parent / "scripts" / "optioned.py"
STEPS, STEPS_AN_EPOCH, SAMPLES = 24, 12, 144
EVERY_5 = {"every_s": None, "every_steps": 5, "keep": 3}
CALM = {"noise": False}
"""Without dropout and batch norm: what they do depends on memory format and on parts."""


class Ranks:
    """The ranks of one job, one generation after another, and what they noted."""

    def __init__(self, folder: Path, launcher: RankLauncher) -> None:
        self.notes, self._launcher = folder / "notes", launcher
        self._storage = FileStorage(folder / "storage")
        self.notes.mkdir(parents=True)

    async def run(self, world: int, *, kept: bool = True, **env: object) -> list[int]:
        """Exit codes. One that dies takes the others along, as dtp would have it."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "PATH": os.environ["PATH"],
            "NOTES": self.notes,
            "OMP_NUM_THREADS": 1,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            **(self._kept() if kept else {}),
            **env,
        }
        ranks = []
        for rank in range(world):
            own = {**common, "RANK": rank, "LOCAL_RANK": rank}
            variables = {key: str(value) for key, value in own.items()}
            spec = RankSpec((sys.executable, str(SCRIPT)), variables, str(self.notes))
            ranks.append(await self._launcher.start(spec))
        return await asyncio.wait_for(_codes(ranks), 240)

    def _kept(self) -> dict[str, object]:
        return {
            wire.Env.JOB_ID: "job",
            wire.Env.ATTEMPT: 1,
            wire.Env.GENERATION: raise_generation(self._storage).generation,
            wire.Env.STORAGE: self._storage.uri,
            wire.Env.CHECKPOINT: json.dumps(EVERY_5),
        }

    def steps(self) -> dict[int, dict[int, tuple[str, str]]]:
        """Step → rank → (loss, sample ids) of its last execution."""
        found: dict[int, dict[int, tuple[str, str]]] = {}
        for path in sorted(self.notes.glob("rank*.txt")):
            for line in path.read_text().splitlines():
                step, loss, ids = line.split()
                found.setdefault(int(step), {})[int(path.stem[4:])] = (loss, ids)
        return found

    def losses(self) -> list[float]:
        """Mean over the ranks of each step's last execution."""
        return [
            sum(float(loss) for loss, _ in ranks.values()) / len(ranks)
            for _, ranks in sorted(self.steps().items())
        ]


async def _codes(ranks: list[RankProcess]) -> list[int]:
    texts = [asyncio.create_task(rank.stderr.read()) for rank in ranks]
    waits = [asyncio.create_task(rank.wait()) for rank in ranks]
    while not all(wait.done() for wait in waits):
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=0.5)
        if any(wait.done() and wait.result() < 0 for wait in waits):
            for rank, wait in zip(ranks, waits, strict=True):
                if not wait.done():
                    os.kill(rank.pid, 9)
            await asyncio.wait(waits)
    codes = [wait.result() for wait in waits]
    told = b"".join([await text for text in texts]).decode()
    assert 1 not in codes or min(codes) < 0, told
    return codes


@pytest.fixture(scope="module")
def zygotes() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dtp-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
async def launcher(zygotes: Path) -> AsyncIterator[RankLauncher]:
    async with RankLauncher(zygotes=zygotes, idle_s=5) as launcher:
        yield launcher


# --------------------------------------------------------------------------------- beside the plain

EXACT: Mapping[str, dict[str, Any]] = {
    "view": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "bucket": {"bucket_mb": 0.005},
    "recompute": {"activation_checkpointing": True},
    "clip": {"clip_grad_norm": 1e6},
    "guard": {"non_finite": "skip"},
    "prefetch": {"prefetch": 5},
    "zero": {"shard": "optimizer"},
    "fsdp": {"shard": "everything"},
}
"""The same numbers in the same order. (With three ranks and more, FSDP sums in another one.)"""
ROUNDED: Mapping[str, dict[str, Any]] = {
    "fused": {"fused_optimizer": True},
    "channels": {"channels_last": True, **CALM},
    "accumulate": {"accumulate": 3, **CALM},
}
"""The same sums in another order: single precision has 7 digits, and 24 steps lose one or two."""
LOSSY: Mapping[str, tuple[dict[str, Any], float]] = {
    # bf16 has 3 digits, fp16 has 4; of gradients only, Adam's division makes up for much of it.
    "bf16": ({"precision": "bf16"}, 0.1),
    "hook_bf16": ({"comm_hook": "bf16"}, 0.05),
    "hook_fp16": ({"comm_hook": "fp16"}, 0.002),
    # A third of the numbers; what is left out comes with later steps.
    "powersgd": ({"comm_hook": "powersgd", "powersgd_rank": 2}, 0.1),
}
FP16 = {"precision": "fp16"}


@pytest.fixture(scope="module", params=[1, 2])
def losses(request: pytest.FixtureRequest, zygotes: Path) -> dict[str, list[float]]:
    """Name of a set of options → losses of rank 0, in one process group."""
    sets = {"plain": {}, "calm": CALM, "fp16": FP16, **EXACT, **ROUNDED}
    sets |= {name: values for name, (values, _) in LOSSY.items()}
    folder = zygotes / f"parity{request.param}"

    async def train() -> list[int]:
        async with RankLauncher(zygotes=zygotes, idle_s=5) as launcher:
            ranks = Ranks(folder, launcher)
            return await ranks.run(request.param, kept=False, SETS=json.dumps(sets), PREFETCH=1)

    assert asyncio.run(train()) == [0] * request.param
    found: dict[str, list[float]] = json.loads((folder / "notes" / "rank0.json").read_text())
    assert all(len(each) == STEPS for each in found.values())
    return found


def plain(losses: dict[str, list[float]], values: Mapping[str, Any]) -> list[float]:
    return losses["calm" if CALM.items() <= values.items() else "plain"]


@pytest.mark.parametrize("name", EXACT)
def test_losses_are_the_plain_ones_to_the_bit(losses: dict[str, list[float]], name: str) -> None:
    """An option that changes where numbers lie, or when they are computed, changes none."""
    assert losses[name] == plain(losses, EXACT[name])


@pytest.mark.parametrize("name", ROUNDED)
def test_losses_are_the_plain_ones_to_rounding(losses: dict[str, list[float]], name: str) -> None:
    """An option that only changes the order of sums."""
    assert losses[name] == pytest.approx(plain(losses, ROUNDED[name]), rel=2e-5)


@pytest.mark.parametrize("name", LOSSY)
def test_losses_are_near_the_plain_ones(losses: dict[str, list[float]], name: str) -> None:
    """An option that computes or sends fewer digits, within what they are worth."""
    values, tolerance = LOSSY[name]
    assert losses[name] == pytest.approx(plain(losses, values), rel=tolerance)


def test_fp16_loses_a_few_first_steps_to_its_scale(losses: dict[str, list[float]]) -> None:
    """It starts too high, each overflow halves it and leaves a step out; from there on the loss
    falls as the plain one does."""
    whole, half = losses["plain"], losses["fp16"]
    assert half[0] == pytest.approx(whole[0], rel=0.005)
    assert sum(half[-6:]) == pytest.approx(sum(whole[-6:]), rel=0.2)


# --------------------------------------------------------------------------------- what is refused


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(channels_last=True), "channels_last: the model has no 2-d convolutions"),
        (Options(activation_checkpointing=True), "finds no repeated blocks"),
        (Options(fused_optimizer=True), "Rprop has no fused kernel"),
    ],
)
def test_an_option_that_cannot_do_what_it_says_ends_the_script(
    options: Options, words: str
) -> None:
    """In one line at the start, instead of doing nothing in silence."""
    model = network()
    with pytest.raises(SystemExit, match=rf"^dtp: training.*{words}"):
        Session(model=model, optimizer=torch.optim.Rprop(model.parameters()), options=options)


def test_a_compiler_that_is_missing_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any step, with what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model = network()
    options = Options(compile=Compile.DEFAULT)
    with pytest.raises(SystemExit, match=r"needs a C\+\+ compiler on every worker, and g\+\+ is"):
        Session(model=model, optimizer=torch.optim.SGD(model.parameters()), options=options)


def test_a_fused_optimizer_stays_fused_after_a_checkpoint_of_a_plain_one() -> None:
    """And its state lies as the parameters do, which fused kernels take for granted."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    optimizer = torch.optim.Adam(model.parameters())
    options = Options(fused_optimizer=True, channels_last=True)
    plain_model = nn.Sequential(nn.Conv2d(2, 3, 3))
    before = torch.optim.Adam(plain_model.parameters())
    plain_model(torch.randn(1, 2, 5, 5)).sum().backward()
    before.step()
    parallel.prepare(model, optimizer, options, torch.device("cpu"))
    optimizer.load_state_dict(before.state_dict())
    assert all(group["fused"] for group in optimizer.param_groups)
    weight = model[0].weight
    state = optimizer.state[weight]["exp_avg"]
    assert state.stride() == weight.stride()
    assert torch.equal(state, before.state[plain_model[0].weight]["exp_avg"])


def test_recomputed_blocks_count_each_batch_once() -> None:
    """Running statistics of batch norm are those of a model that keeps its activations; names in
    its state, and what a copy of it is, do not change."""
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]

    class Layer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    model = nn.Sequential(*(Layer(block) for block in blocks))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(8, 4)
    model(x).sum().backward()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    options = Options(activation_checkpointing=True)
    parallel.prepare(model, torch.optim.SGD(model.parameters()), options, torch.device("cpu"))
    model(x).sum().backward()
    assert list(model.state_dict()) == list(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert isinstance(model[0], Layer)


# ------------------------------------------------------------------------------------- interrupted

SETS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "halves": (
        3,
        {
            "precision": "bf16",
            "accumulate": 2,
            "clip_grad_norm": 1.0,
            "comm_hook": "bf16",
            "gradient_as_bucket_view": True,
        },
    ),
    "scaled": (  # with a static graph and three ranks, the first step of each start is rounded anew
        2,
        {
            "precision": "fp16",
            "comm_hook": "fp16",
            "static_graph": True,
            "bucket_mb": 0.005,
            "fused_optimizer": True,
            "non_finite": "skip",
        },
    ),
    "factors": (
        3,
        {
            "comm_hook": "powersgd",
            "powersgd_rank": 2,
            "bucket_mb": 0.01,
            "channels_last": True,
            "activation_checkpointing": True,
        },
    ),
    "zero": (3, {"shard": "optimizer", "fused_optimizer": True, "clip_grad_norm": 1.0}),
    "fsdp": (2, {"shard": "everything", "accumulate": 2, "activation_checkpointing": True}),
}
"""Every option in at least one of them, with the number of ranks; compile has a test of its own."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SETS)
async def test_interrupted_losses_are_the_uninterrupted_ones_to_the_bit(
    tmp_path: Path, launcher: RankLauncher, name: str
) -> None:
    """Paused twice and killed once in between, at the same number of ranks."""
    world, values = SETS[name]
    env = {wire.Env.OPTIONS: json.dumps(values)}
    calm, broken = Ranks(tmp_path / "calm", launcher), Ranks(tmp_path / "broken", launcher)
    assert await calm.run(world, **env) == [0] * world
    assert await broken.run(world, **env, ASK="0:4") == [75] * world
    assert -9 in await broken.run(world, **env, DIE="1:13")
    assert await broken.run(world, **env, ASK="1:18") == [75] * world
    assert await broken.run(world, **env) == [0] * world
    assert broken.steps() == calm.steps()
    assert sorted(calm.steps()) == list(range(1, STEPS + 1))


SCALED: Mapping[str, tuple[dict[str, Any], float]] = {
    "exact": ({"gradient_as_bucket_view": True, "static_graph": True, "bucket_mb": 0.005}, 1e-4),
    "zero": ({"shard": "optimizer", "clip_grad_norm": 1.0, "fused_optimizer": True}, 1e-4),
    "fsdp": ({"shard": "everything", "activation_checkpointing": True}, 1e-4),
    # Rounded to bf16 on each rank before they are summed, gradients differ in the third digit.
    "halves": ({"comm_hook": "bf16", "channels_last": True, "accumulate": 2}, 0.05),
    # One rank sends nothing; errors begin anew with each change.
    "factors": ({"comm_hook": "powersgd", "powersgd_rank": 2}, 0.15),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SCALED)
async def test_scaled_losses_are_the_unscaled_ones_to_rounding(
    tmp_path: Path, launcher: RankLauncher, name: str
) -> None:
    """1 → 2 → 3 → 1 ranks, changed in the middle of epochs; and every sample comes once an
    epoch."""
    values, tolerance = SCALED[name]
    env = {wire.Env.OPTIONS: json.dumps(values), "NOISE": 0}
    whole, scaled = Ranks(tmp_path / "whole", launcher), Ranks(tmp_path / "scaled", launcher)
    assert await whole.run(2, **env) == [0, 0]
    for world, asked in ((1, "0:4"), (2, "1:9"), (3, "2:17")):
        assert await scaled.run(world, **env, ASK=asked) == [75] * world
    assert await scaled.run(1, **env) == [0]
    assert scaled.losses() == pytest.approx(whole.losses(), rel=tolerance)
    seen = [Counter[str]() for _ in range(STEPS // STEPS_AN_EPOCH)]
    for step, ranks in scaled.steps().items():
        for _, ids in ranks.values():
            seen[(step - 1) // STEPS_AN_EPOCH].update(ids.split(","))
    assert all(epoch == Counter(map(str, range(SAMPLES))) for epoch in seen)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
async def test_a_compiled_model_may_be_interrupted_and_left_uncompiled(
    tmp_path: Path, launcher: RankLauncher
) -> None:
    """Paused, its losses are the same to the bit, dropout included; its checkpoints have the names
    of the plain model, which goes on from them."""
    values = {"compile": "default", "activation_checkpointing": True}
    env = {wire.Env.OPTIONS: json.dumps(values)}
    calm, broken = Ranks(tmp_path / "calm", launcher), Ranks(tmp_path / "broken", launcher)
    assert await calm.run(2, **env, ASK="0:12") == [75, 75]
    assert await broken.run(2, **env, ASK="0:5") == [75, 75]
    assert await broken.run(2, **env, ASK="0:12") == [75, 75]
    first = {step: ranks for step, ranks in broken.steps().items() if step <= 12}
    assert first == {step: ranks for step, ranks in calm.steps().items() if step <= 12}
    assert await broken.run(2) == [0, 0]
    assert len(broken.steps()) == STEPS
