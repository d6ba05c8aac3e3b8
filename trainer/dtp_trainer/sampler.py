"""The order of samples as a pure function of (seed, epoch, step, rank, world size).

The samples of an epoch are dealt to *lanes*; a step takes the next few of every lane. A rank owns a
run of neighbouring lanes, so the lanes' order, and with it every global batch, is the same at any
world size, and the state of the data is two integers: epoch and step.

Nothing is stored: an order is evaluated where it is needed by a keyed permutation (a Feistel
network over the bits of the position), so ten million samples start as fast as ten, and an order
does not change with a version of numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = NDArray[np.int64]
_Words: TypeAlias = NDArray[np.uint64]


class SamplerError(ValueError):
    """Sizes that do not fit each other; the message says which would."""


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """The next batch to train on."""

    epoch: int = 0
    step: int = 0
    """Within the epoch."""


class Lanes:
    """The batches of a dataset of `size` samples.

    Each sample is used at most once an epoch. The tail that fills no batch (``size % global_batch``
    samples, others in each epoch) is dropped, so that every batch weighs the same on every rank.

    Args:
        size: Number of samples.
        global_batch: Samples a step, over all ranks.
        seed: Any integer; another seed is another order.
        lanes: Number of lanes, a divisor of `global_batch`; as many as that by default. World sizes
            that divide it are legal.
        shard_sizes: Samples of each shard, in the dataset's order. When given, shards are shuffled
            and a lane reads a few of them one after the other, shuffled in blocks: a rank then
            fetches its part of the shards only. Without, all samples are shuffled freely.
        block: With `shard_sizes`: how many neighbouring samples of a lane are shuffled together.
    """

    def __init__(
        self,
        size: int,
        global_batch: int,
        seed: int,
        *,
        lanes: int | None = None,
        shard_sizes: Sequence[int] | None = None,
        block: int = 4096,
    ) -> None:
        lanes = global_batch if lanes is None else lanes
        _check(size, global_batch, lanes, shard_sizes)
        self.size = size
        self.global_batch = global_batch
        self.seed = seed
        self.lanes = lanes
        self.steps_per_epoch = size // global_batch
        self._block = block
        self._shards = None if shard_sizes is None else np.asarray(shard_sizes, np.int64)
        self._ahead: dict[tuple[int, int], tuple[tuple[int, int], Indices]] = {}

    def __repr__(self) -> str:
        return (
            f"Lanes(size={self.size}, global_batch={self.global_batch}, seed={self.seed}, "
            f"lanes={self.lanes})"
        )

    def legal_world_sizes(self) -> tuple[int, ...]:
        """The world sizes to which the lanes can be dealt evenly, ascending."""
        return tuple(n for n in range(1, self.lanes + 1) if self.lanes % n == 0)

    def check_world_size(self, world: int) -> None:
        """Raises `SamplerError`, naming the nearest legal world sizes."""
        if world > 0 and self.lanes % world == 0:
            return
        legal = self.legal_world_sizes()
        below = [n for n in legal if n < world][-1:]
        above = [n for n in legal if n > world][:1]
        raise SamplerError(
            f"a global batch of {self.global_batch} in {self.lanes} lanes cannot be dealt evenly "
            f"to {world} ranks; the nearest that can: {' or '.join(map(str, below + above))}"
        )

    def indices(self, epoch: int, step: int, rank: int, world: int) -> Indices:
        """The samples of `rank` in a step of an epoch: shape ``(global_batch / world,)``.

        Put together in the order of ranks they are the global batch, in one order for every world.
        """
        self.check_world_size(world)
        if not (0 <= step < self.steps_per_epoch and 0 <= rank < world and epoch >= 0):
            raise SamplerError(
                f"there is no epoch {epoch}, step {step}, rank {rank} of {world}: an epoch has "
                f"{self.steps_per_epoch} steps"
            )
        share = self.global_batch // world
        together = max(1, _EVALUATED_TOGETHER // share)
        chunk, batches = self._ahead.get((rank, world), (None, None))
        if batches is None or chunk != (epoch, step // together):
            chunk = (epoch, step // together)
            first = chunk[1] * together
            steps = np.arange(first, min(first + together, self.steps_per_epoch))
            batches = self._evaluate(epoch, steps, rank * share + np.arange(share))
            self._remember(rank, world, (chunk, batches))
        batch: Indices = batches[step % together].copy()
        return batch

    def _remember(self, rank: int, world: int, found: tuple[tuple[int, int], Indices]) -> None:
        if len(self._ahead) >= _REMEMBERED:
            self._ahead.clear()
        self._ahead[rank, world] = found

    def walk(
        self, start: Position, *, epochs: int, rank: int, world: int
    ) -> Iterator[tuple[Position, Indices]]:
        """Each position from `start` to the end of the last epoch with the samples of `rank`."""
        at = start
        while at.epoch < epochs:
            yield at, self.indices(at.epoch, at.step, rank, world)
            at = self.after(at)

    def after(self, position: Position) -> Position:
        """The position one step on."""
        return self.at_step(position.epoch * self.steps_per_epoch + position.step + 1)

    def at_step(self, total: int) -> Position:
        """The position after `total` steps since the beginning of the first epoch."""
        return Position(*divmod(total, self.steps_per_epoch))

    def state(self, position: Position) -> dict[str, int]:
        """What a checkpoint keeps of the data: plain integers, the same at any world size."""
        return {"epoch": position.epoch, "step": position.step, **self._identity()}

    def position(self, state: Mapping[str, Any]) -> Position:
        """The position in a `state`, here or in an earlier life.

        Raises:
            SamplerError: it belongs to another order: size, batch, seed or lanes have changed.
        """
        changed = [
            f"{name} was {state[name]} and is {now}"
            for name, now in self._identity().items()
            if state.get(name, now) != now
        ]
        if changed:
            raise SamplerError(
                f"the checkpoint's place in the data means nothing here: {', '.join(changed)}; "
                "set them back, or start a new job"
            )
        return Position(int(state["epoch"]), int(state["step"]))

    def _identity(self) -> dict[str, int]:
        return {
            "size": self.size,
            "global_batch": self.global_batch,
            "seed": self.seed,
            "lanes": self.lanes,
        }

    def _evaluate(self, epoch: int, steps: Indices, columns: Indices) -> Indices:
        """Samples by step and column of the global batch: shape ``(len(steps), len(columns))``."""
        if self._shards is None:
            slots = steps[:, None] * self.global_batch + columns
            return permuted(slots, self.size, _key(self.seed, epoch)).astype(np.int64)
        return self._evaluate_shards(epoch, steps, columns, self._shards)

    def _evaluate_shards(
        self, epoch: int, steps: Indices, columns: Indices, sizes: Indices
    ) -> Indices:
        width = self.global_batch // self.lanes
        lane, offset = columns // width, columns % width
        in_lane = steps[:, None] * width + offset
        slots = lane * self.steps_per_epoch * width + self._shuffled(epoch, lane, in_lane)
        order = permuted(np.arange(len(sizes)), len(sizes), _key(self.seed, epoch, 1))
        order = order.astype(np.int64)
        ends = np.cumsum(sizes[order])
        place = np.searchsorted(ends, slots, side="right")
        starts = np.cumsum(sizes) - sizes
        samples: Indices = starts[order[place]] + slots - (ends - sizes[order])[place]
        return samples

    def _shuffled(self, epoch: int, lane: Indices, in_lane: Indices) -> Indices:
        """Places in a lane, shuffled within blocks; the last block may be shorter."""
        length = self.steps_per_epoch * (self.global_batch // self.lanes)
        block, within = in_lane // self._block, in_lane % self._block
        salt = (block + lane * (length // self._block + 1)).astype(np.uint64)
        keys = _mixed(salt + np.uint64(_key(self.seed, epoch, 2)))
        shuffled = np.empty_like(in_lane)
        last = block == length // self._block
        for chosen, size in ((~last, self._block), (last, length % self._block)):
            if chosen.any():
                shuffled[chosen] = permuted(within[chosen], size, keys[chosen])
        return block * self._block + shuffled


def _check(size: int, global_batch: int, lanes: int, shards: Sequence[int] | None) -> None:
    if global_batch < 1 or size < global_batch:
        raise SamplerError(
            f"a global batch of {global_batch} does not fit a dataset of {size} samples: "
            "it must be at least 1 and at most the dataset"
        )
    if lanes < 1 or global_batch % lanes:
        raise SamplerError(f"{lanes} lanes do not divide a global batch of {global_batch}")
    if shards is not None and (sum(shards) != size or min(shards) < 0):
        raise SamplerError(f"the shards hold {sum(shards)} samples, the dataset {size}")


# ---------------------------------------------------------------------------- keyed permutations

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_EVALUATED_TOGETHER = 8192
_REMEMBERED = 16


def permuted(places: NDArray[Any], size: int, key: int | _Words) -> _Words:
    """Where a permutation of ``range(size)`` sends `places`; `key` chooses the permutation.

    Args:
        places: Integers in ``range(size)``, any shape.
        key: Well mixed; one for all places, or one for each.
    """
    low = max(1, (size - 1).bit_length()) // 2
    high = max(1, (size - 1).bit_length()) - low
    keys = np.broadcast_to(np.asarray(key, np.uint64), places.shape)
    result = _rounds(places.astype(np.uint64), keys, low, high)
    # The network permutes a power of two; following it until it is back inside permutes the rest.
    while (outside := result >= size).any():
        result[outside] = _rounds(result[outside], keys[outside], low, high)
    return result


def _rounds(words: _Words, keys: _Words, low: int, high: int) -> _Words:
    right, left = words & np.uint64((1 << low) - 1), words >> np.uint64(low)
    # Halves of a few bits mix slowly: with 8 rounds some orders of 5 samples come 10 % too often.
    for number in range(8 if low + high > 6 else 16):
        round_keys = keys + np.uint64(number * _GOLDEN & _WORD)
        if number % 2:
            right = right ^ (_mixed(left + round_keys) & np.uint64((1 << low) - 1))
        else:
            left = left ^ (_mixed(right + round_keys) & np.uint64((1 << high) - 1))
    return (left << np.uint64(low)) | right


def _mixed(words: _Words) -> _Words:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _key(*parts: int) -> int:
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mixed(key + np.uint64((part + 1) * _GOLDEN & _WORD))
    return int(key[0])
