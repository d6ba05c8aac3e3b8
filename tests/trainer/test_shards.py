"""Promises of prepared data: same input, same bytes; whole or refused; read fast and exactly."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtp_trainer.sampler import Lanes
from dtp_trainer.shards import (
    MANIFEST,
    Field,
    Schema,
    Shard,
    ShardDataset,
    ShardEntry,
    ShardError,
    shard_name,
    write_manifest,
    write_shard,
)
from dtp_trainer.storage import FileStorage, NotFound, StorageError

IMAGES = Schema((Field("image", "uint8", (4, 3)), Field("label", "int64"), Field("id", "<u4")))
TEXTS = Schema((Field("text", "uint8", None), Field("weight", "float32"), Field("t", "u2", None)))


PINNED_BYTES = 396
PINNED_SHA256 = "5fdbe198dffd26570636eb415806d69182edaad2aa36e89335cd3cd7d13e9f92"


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path)


def image(number: int) -> dict[str, Any]:
    return {"image": np.full((4, 3), number % 256, np.uint8), "label": -number, "id": number}


def text(number: int) -> dict[str, Any]:
    return {"text": b"x" * number, "weight": number / 3, "t": np.arange(number % 5)}


def image_dataset(store: FileStorage, sizes: tuple[int, ...] = (5, 1, 7)) -> ShardDataset:
    entries, first = [], 0
    for number, size in enumerate(sizes):
        samples = (image(first + row) for row in range(size))
        entries.append(write_shard(store, f"set/{number}.dtps", IMAGES, samples))
        first += size
    write_manifest(store, "set", IMAGES, entries)
    return ShardDataset(store, "set")


def test_a_shard_gives_its_samples_back(store: FileStorage) -> None:
    """Fields of fixed and of differing shape come back by index, type by type."""
    entry = write_shard(store, "t.dtps", TEXTS, map(text, range(20)))
    shard = Shard(store, "t.dtps", entry=entry)
    assert len(shard) == entry.records == 20
    assert shard.schema == TEXTS
    for number, sample in enumerate(shard):  # type: ignore[arg-type, var-annotated]
        assert sample["text"].tobytes() == b"x" * number
        assert sample["weight"] == np.float32(number / 3)
        assert sample["t"].dtype == np.uint16
        assert sample["t"].tolist() == list(range(number % 5))


def test_same_samples_same_bytes(store: FileStorage) -> None:
    """A shard written twice is the same file; its entry's hash is that of the file."""
    first = write_shard(store, "a.dtps", IMAGES, map(image, range(9)))
    second = write_shard(store, "b.dtps", IMAGES, map(image, range(9)))
    data = store.read("a.dtps")
    assert data == store.read("b.dtps")
    assert first.sha256 == second.sha256 == hashlib.sha256(data).hexdigest()
    assert first.bytes == len(data)


def test_the_format_is_pinned(store: FileStorage) -> None:
    """Files of today are readable for ever: the bytes of this shard may not change."""
    entry = write_shard(store, "a.dtps", IMAGES, map(image, range(3)))
    assert entry == ShardEntry("a.dtps", 3, PINNED_BYTES, PINNED_SHA256)


def test_the_name_follows_the_input(store: FileStorage) -> None:
    """Input and version of the transformation name the shard; either changed is another name."""
    names = {shard_name("a", "1"), shard_name("a", "2"), shard_name("b", "1")}
    assert len(names) == 3
    assert shard_name("a", "1") in names


def test_a_dataset_is_read_by_index_across_shards(store: FileStorage) -> None:
    """Samples are numbered through all shards in the order of their names."""
    dataset = image_dataset(store)
    assert len(dataset) == 13
    assert dataset.shard_sizes == (5, 1, 7)
    assert [int(dataset[n]["id"]) for n in range(13)] == list(range(13))
    with pytest.raises(IndexError):
        dataset[13]


@given(st.lists(st.integers(0, 12), max_size=20))
@settings(deadline=None, max_examples=40)
def test_a_batch_is_its_samples_stacked(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int]
) -> None:
    """A batch in any order, repetitions included, equals its samples one by one."""
    dataset = image_dataset(FileStorage(tmp_path_factory.mktemp("batch")))
    batch = dataset.__getitems__(indices)
    assert batch["id"].tolist() == indices
    assert batch["image"].shape == (len(indices), 4, 3)
    assert batch["label"].dtype == np.int64
    for row, index in enumerate(indices):
        assert all(np.array_equal(batch[name][row], dataset[index][name]) for name in batch)


def test_batches_outside_are_refused(store: FileStorage) -> None:
    """An index outside the dataset is an error in a batch, too."""
    for indices in ([0, 13], [-1, 0]):
        with pytest.raises(IndexError):
            image_dataset(store).__getitems__(indices)


def test_samples_of_differing_length_come_as_a_list(store: FileStorage) -> None:
    """Where lengths differ a batch is a list of samples, and `convert` is applied to each."""
    entry = write_shard(store, "t.dtps", TEXTS, map(text, range(4)))
    write_manifest(store, "", TEXTS, [entry])
    dataset = ShardDataset(store, convert=lambda sample: sample["text"].tobytes())
    assert dataset.__getitems__([3, 1]) == [b"xxx", b"x"]
    assert dataset[2] == b"xx"


def test_lanes_go_over_shards(store: FileStorage) -> None:
    """Order and dataset fit each other: an epoch reads every sample once."""
    dataset = image_dataset(store, (5, 1, 10))
    lanes = Lanes(len(dataset), 4, 0, lanes=2, shard_sizes=dataset.shard_sizes, block=3)
    batches = [dataset.__getitems__(lanes.indices(0, step, 0, 1)) for step in range(4)]
    assert sorted(np.concatenate([b["id"] for b in batches]).tolist()) == list(range(16))


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"image": np.zeros((4, 3)), "label": 1, "id": 1}, "image has shape .* of float64"),
        ({"image": np.zeros((3, 4), np.uint8), "label": 1, "id": 1}, r"shape \(3, 4\)"),
        ({"image": np.full((4, 3), 256), "label": 1, "id": 1}, "its values must fit"),
        ({"image": np.zeros((4, 3), np.uint8), "label": 1, "id": -1}, "id has shape"),
        ({"image": np.zeros((4, 3), np.uint8)}, "a sample has image; the schema says image, label"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    store: FileStorage, sample: dict[str, Any], said: str
) -> None:
    """A sample of another shape, kind or range is refused by field, and nothing is written."""
    with pytest.raises(ShardError, match=said):
        write_shard(store, "a.dtps", IMAGES, [sample])
    assert list(store.list()) == []


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_flipped_bit_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A shard with one flipped bit anywhere, or cut anywhere, is refused in one line."""
    store = FileStorage(tmp_path_factory.mktemp("flip"))
    write_shard(store, "a.dtps", IMAGES, map(image, range(6)))
    content = bytearray(store.read("a.dtps"))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    store.write("a.dtps", bytes(content))
    with pytest.raises(ShardError) as caught:
        Shard(store, "a.dtps")
    assert "\n" not in str(caught.value)
    store.write("a.dtps", bytes(content[: data.draw(st.integers(0, len(content) - 1))]))
    with pytest.raises(ShardError):
        Shard(store, "a.dtps")


def test_the_place_of_damage_is_named(store: FileStorage) -> None:
    """The checks of the blocks tell where in a large shard the damage is."""
    big = Schema((Field("x", "uint8", (1 << 19,)),))
    write_shard(store, "a.dtps", big, ({"x": np.full(1 << 19, n, np.uint8)} for n in range(6)))
    content = bytearray(store.read("a.dtps"))
    content[(2 << 20) + 5] ^= 1
    store.write("a.dtps", bytes(content))
    with pytest.raises(ShardError, match="damaged between bytes 2097152 and 3145"):
        Shard(store, "a.dtps")


def test_a_shard_of_another_dataset_is_refused(store: FileStorage) -> None:
    """A whole shard that is not the one in the manifest is told from a damaged one."""
    dataset = image_dataset(store)
    write_shard(store, "set/1.dtps", IMAGES, [image(99)])
    with pytest.raises(ShardError, match="whole but not the shard in the manifest"):
        dataset[5]


def test_a_dataset_exists_with_its_manifest(store: FileStorage) -> None:
    """Without its manifest there is no dataset; with it there is one, for good."""
    entry = write_shard(store, "d/a.dtps", IMAGES, [image(1)])
    with pytest.raises(NotFound, match="not prepared, or not finished"):
        ShardDataset(store, "d")
    write_manifest(store, "d", IMAGES, [entry])
    write_manifest(store, "d", IMAGES, [entry])
    assert len(ShardDataset(store, "d/")) == 1
    with pytest.raises(ShardError, match="another dataset already"):
        write_manifest(store, "d", IMAGES, [])


def test_other_manifests_are_explained(store: FileStorage) -> None:
    """What is no manifest, or one of a newer format, is said in one line."""
    for content, said in (("{", "is not the manifest"), ('{"format": 9}', "has format 9")):
        store.write(MANIFEST, content.encode())
        with pytest.raises(StorageError, match=said):
            ShardDataset(store)
    assert json.loads(store.read(MANIFEST)) == {"format": 9}


def test_an_empty_shard_and_dataset_are_fine(store: FileStorage) -> None:
    """An input that yields nothing makes a shard of nothing."""
    write_manifest(store, "", IMAGES, [write_shard(store, "a.dtps", IMAGES, [])])
    dataset = ShardDataset(store)
    assert len(dataset) == 0
    assert dataset.__getitems__([])["image"].shape == (0, 4, 3)
    assert len(Shard(store, "a.dtps")) == 0


def test_batches_are_fetched_together(store: FileStorage) -> None:
    """Reading by batches goes through whole tables (shown, not timed)."""
    schema = Schema((Field("tokens", "uint16", (256,)), Field("label", "int64")))
    tokens = np.arange(256, dtype=np.uint16)
    entries = [
        write_shard(
            store, f"{n}.dtps", schema, ({"tokens": tokens, "label": i} for i in range(2000))
        )
        for n in range(3)
    ]
    write_manifest(store, "", schema, entries)
    dataset = ShardDataset(store)
    lanes = Lanes(len(dataset), 64, 0)
    began = time.perf_counter()
    read = sum(
        len(dataset.__getitems__(lanes.indices(0, step, 0, 1))["label"])
        for step in range(lanes.steps_per_epoch)
    )
    rate = read / (time.perf_counter() - began)
    print(f"{rate:,.0f} samples of 520 B/s, shuffled, by 64, first reading included")
    assert read == lanes.steps_per_epoch * 64
