"""Promises of the order of samples: exact at any world size, each sample at most once an epoch."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtp_trainer.sampler import Lanes, Position, SamplerError, permuted

FREE_ORDER = [[2, 3, 10, 1], [15, 5, 0, 16], [17, 13, 7, 19], [12, 4, 9, 11], [6, 14, 8, 18]]
SHARDED_ORDER = [[6, 7, 15, 16], [5, 8, 17, 19], [10, 9, 0, 18], [12, 13, 2, 3], [11, 14, 1, 4]]


@st.composite
def some_lanes(draw: st.DrawFn) -> Lanes:
    """Free or sharded, with any number of lanes and a dataset that rarely fits evenly."""
    lanes = draw(st.sampled_from([1, 2, 4, 6, 12]))
    batch = lanes * draw(st.integers(1, 4))
    seed = draw(st.integers(-(2**70), 2**70))
    if draw(st.booleans()):
        return Lanes(draw(st.integers(batch, 300)), batch, seed, lanes=lanes)
    shards = [*draw(st.lists(st.integers(0, 60), min_size=1, max_size=12)), batch]
    block = draw(st.integers(1, 50))
    return Lanes(sum(shards), batch, seed, lanes=lanes, shard_sizes=shards, block=block)


def global_batch(lanes: Lanes, epoch: int, step: int, world: int) -> list[int]:
    ranks = [lanes.indices(epoch, step, rank, world) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1
    return [int(i) for i in np.concatenate(ranks)]


@settings(deadline=None)
@given(some_lanes(), st.integers(0, 1000))
def test_each_sample_at_most_once_an_epoch(lanes: Lanes, epoch: int) -> None:
    """An epoch uses all samples but a tail smaller than one batch, none of them twice."""
    steps = range(lanes.steps_per_epoch)
    used = list(itertools.chain(*(global_batch(lanes, epoch, s, 1) for s in steps)))
    assert len(set(used)) == len(used) > lanes.size - lanes.global_batch
    assert set(used) <= set(range(lanes.size))


@settings(deadline=None)
@given(some_lanes(), st.data())
def test_every_world_size_has_the_same_global_batch(lanes: Lanes, data: st.DataObject) -> None:
    """At every legal world size the ranks' samples are the same batch in the same order."""
    epoch = data.draw(st.integers(0, 5))
    step = data.draw(st.integers(0, lanes.steps_per_epoch - 1))
    batches = [global_batch(lanes, epoch, step, world) for world in lanes.legal_world_sizes()]
    assert all(batch == batches[0] for batch in batches)


@settings(deadline=None, max_examples=50)
@given(some_lanes(), st.data())
def test_an_epoch_goes_on_at_another_world_size(lanes: Lanes, data: st.DataObject) -> None:
    """A run that changes its world size at any steps is one epoch exactly."""
    total = 2 * lanes.steps_per_epoch
    world = st.sampled_from(lanes.legal_world_sizes())
    straight = np.concatenate([b for _, b in lanes.walk(Position(), epochs=2, rank=0, world=1)])
    cuts = data.draw(st.lists(st.integers(0, total), max_size=4).map(sorted))
    resumed: list[int] = []
    state = lanes.state(Position())
    for until in [*cuts, total]:
        ranks, at = data.draw(world), lanes.position(state)
        while at < lanes.at_step(until):
            resumed += global_batch(lanes, at.epoch, at.step, ranks)
            at = lanes.after(at)
        state = lanes.state(at)
    assert resumed == straight.tolist()


@settings(deadline=None)
@given(some_lanes())
def test_epochs_and_seeds_differ(lanes: Lanes) -> None:
    """Another epoch or seed is another order, wherever orders enough exist to tell."""
    if lanes.steps_per_epoch < 3 or lanes.global_batch < 6 or lanes._shards is not None:
        return
    other = Lanes(lanes.size, lanes.global_batch, lanes.seed + 1, lanes=lanes.lanes)
    steps = range(lanes.steps_per_epoch)
    orders = {
        tuple(itertools.chain(*(global_batch(source, epoch, s, 1) for s in steps)))
        for source, epoch in ((lanes, 0), (lanes, 1), (other, 0))
    }
    assert len(orders) == 3


def test_the_order_is_pinned() -> None:
    """The order is part of what a checkpoint means: no release may change it."""
    free = Lanes(20, 4, 7)
    sharded = Lanes(20, 4, 7, lanes=2, shard_sizes=[5, 5, 10], block=3)
    assert [global_batch(free, 1, s, 1) for s in range(5)] == FREE_ORDER
    assert [global_batch(sharded, 1, s, 1) for s in range(5)] == SHARDED_ORDER


@pytest.mark.parametrize("size", [2, 3, 5, 7, 12, 100])
def test_the_order_is_even(size: int) -> None:
    """Over many keys each sample comes at each place about equally often."""
    rounds = 20_000
    keys = np.random.default_rng(0).integers(2**64, size=rounds, dtype=np.uint64)
    for place in {0, 1, size // 2, size - 1}:
        sent = permuted(np.full(rounds, place), size, keys)
        counts = np.bincount(sent.astype(np.int64), minlength=size)
        chi_square = float(((counts - rounds / size) ** 2 / (rounds / size)).sum())
        # Mean size - 1, deviation sqrt(2 (size - 1)): five deviations, deterministic input.
        assert chi_square < size - 1 + 5 * (2 * (size - 1)) ** 0.5


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_keyed_permutation_is_one(size: int, key: int) -> None:
    """Every key sends range(size) onto itself."""
    assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_rank_reads_its_part_of_the_shards() -> None:
    """With shards, twice the ranks means half the shards for each."""
    lanes = Lanes(200 * 100, 96, 0, lanes=48, shard_sizes=[100] * 200, block=64)
    for world in (1, 2, 4, 8):
        parts = [lanes.indices(0, s, 0, world) for s in range(lanes.steps_per_epoch)]
        assert len(np.unique(np.concatenate(parts) // 100)) <= 200 / world + 2


def test_samples_of_one_lane_are_mixed() -> None:
    """Within a lane neighbours in a shard do not follow each other."""
    lanes = Lanes(10_000, 10, 0, lanes=10, shard_sizes=[1000] * 10, block=500)
    lane = np.array([lanes.indices(0, s, 0, 10)[0] for s in range(1000)])
    assert np.mean(np.abs(np.diff(lane)) == 1) < 0.02


@pytest.mark.parametrize(
    ("batch", "world", "near"),
    [(64, 3, "2 or 4"), (12, 5, "4 or 6"), (12, 13, "12"), (7, 2, "1 or 7"), (8, 0, "1")],
)
def test_a_world_that_does_not_divide_is_refused(batch: int, world: int, near: str) -> None:
    """A world size that cannot be dealt to evenly is answered with the nearest that can."""
    with pytest.raises(SamplerError, match=f"to {world} ranks; the nearest that can: {near}$"):
        Lanes(100, batch, 0).indices(0, 0, 0, world)


def test_legal_world_sizes_divide_the_lanes() -> None:
    """Legal are the divisors of the number of lanes."""
    assert Lanes(1000, 48, 0).legal_world_sizes() == (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
    assert Lanes(1000, 48, 0, lanes=6).legal_world_sizes() == (1, 2, 3, 6)


def test_sizes_that_do_not_fit_are_explained() -> None:
    """Impossible sizes are refused when the object is made, with what is wrong."""
    with pytest.raises(SamplerError, match="64 does not fit a dataset of 10 samples"):
        Lanes(10, 64, 0)
    with pytest.raises(SamplerError, match="at least 1"):
        Lanes(10, 0, 0)
    with pytest.raises(SamplerError, match="5 lanes do not divide"):
        Lanes(100, 8, 0, lanes=5)
    with pytest.raises(SamplerError, match="the shards hold 9 samples, the dataset 10"):
        Lanes(10, 2, 0, shard_sizes=[4, 5])
    with pytest.raises(SamplerError, match="an epoch has 5 steps"):
        Lanes(10, 2, 0).indices(0, 5, 0, 1)


def test_a_position_of_another_order_is_refused() -> None:
    """A state whose dataset, batch or seed was another is refused, naming what changed."""
    state = Lanes(100, 10, 0).state(Position(2, 3))
    assert state == {"epoch": 2, "step": 3, "size": 100, "global_batch": 10, "seed": 0, "lanes": 10}
    with pytest.raises(SamplerError, match=r"size was 100 and is 90, seed was 0 and is 1; set"):
        Lanes(90, 10, 1).position(state)
    assert Lanes(100, 10, 0).position({"epoch": 2, "step": 3}) == Position(2, 3)


def test_ten_million_samples_start_at_once() -> None:
    """Any step of a large dataset is found without building its order (shown, not timed)."""
    lanes = Lanes(10_000_000, 256, 1)
    began = time.perf_counter()
    batch = lanes.indices(5, lanes.steps_per_epoch - 1, 1, 2)
    print(f"10M samples, first batch: {1000 * (time.perf_counter() - began):.1f} ms")
    assert len(batch) == 128
    assert sum(batches.nbytes for _, batches in lanes._ahead.values()) < 1 << 20
