"""Prepared data: files of records that are written independently, and the manifest that joins them.

A shard, all numbers little-endian::

    header    64 bytes: magic, version, codec, records, bytes of data and schema, block size
    schema    JSON, padded with spaces to 64 bytes
    records   one after the other, padded with zeros to 8 bytes
    offsets   int64 for each record and one for the end, from the first record
    checks    crc32 of each block of all the above, then the sha256 of all before it

Same samples, same bytes: a shard that is written twice (queues deliver at least once) is written
once. ``dataset.json`` names the shards with their hashes; it is written last, and then the dataset
exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import mmap
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dtp_trainer.storage import Conflict, NotFound, Storage, StorageError

Sample: TypeAlias = Mapping[str, ArrayLike]
Arrays: TypeAlias = dict[str, NDArray[Any]]

MANIFEST = "dataset.json"
SUFFIX = ".dtps"
_FORMAT = 1
_PLAIN = 0
_HEADER = struct.Struct("<8sIIQQII24x")
_MAGIC = b"DTPSHARD"
_BLOCK_BYTES = 1 << 20
_SHA_BYTES = 32


class ShardError(StorageError):
    """A shard or dataset that is damaged, or samples that do not fit its schema."""


# ----------------------------------------------------------------------------------------- schema


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    dtype: str
    """As numpy names it: ``uint8``, ``<f4``."""
    shape: tuple[int, ...] | None = ()
    """None: one dimension, of another length in each sample (text, encoded images, tokens)."""


@dataclass(frozen=True)
class Schema:
    """What a sample holds. Equal schemas give equal bytes."""

    fields: tuple[Field, ...]

    @cached_property
    def fixed(self) -> np.dtype[Any]:
        """The part of a record that every sample has: fields of fixed shape, lengths of others."""
        return np.dtype(
            [
                (field.name, "<u4" if field.shape is None else _little(field), field.shape or ())
                for field in self.fields
            ]
        )

    @cached_property
    def loose(self) -> tuple[Field, ...]:
        """The fields whose length differs; they follow the fixed part in this order."""
        return tuple(field for field in self.fields if field.shape is None)

    def encode(self, sample: Sample) -> bytes:
        """One record. Raises `ShardError`."""
        if set(sample) != {field.name for field in self.fields}:
            names = ", ".join(field.name for field in self.fields)
            raise ShardError(f"a sample has {', '.join(sample)}; the schema says {names}")
        fixed = np.zeros((), self.fixed)
        tail = []
        for field in self.fields:
            value = self._fitting(field, sample[field.name])
            fixed[field.name] = len(value) if field.shape is None else value
            if field.shape is None:
                tail.append(value.tobytes())
        return b"".join((fixed.tobytes(), *tail))

    def decode(self, record: memoryview) -> Arrays:
        """One sample; its arrays are read-only views of `record`."""
        fixed = np.frombuffer(record, self.fixed, 1)[0]
        sample: Arrays = {}
        at = self.fixed.itemsize
        for field in self.fields:
            value = np.asarray(fixed[field.name])
            if field.shape is None:
                sample[field.name] = np.frombuffer(record, _little(field), int(value), at)
                at += sample[field.name].nbytes
            else:
                sample[field.name] = value
        return sample

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(field) for field in self.fields]

    @classmethod
    def from_json(cls, fields: Sequence[Mapping[str, Any]]) -> Schema:
        shapes = [None if f["shape"] is None else tuple(f["shape"]) for f in fields]
        return cls(
            tuple(Field(f["name"], f["dtype"], s) for f, s in zip(fields, shapes, strict=True))
        )

    @staticmethod
    def _fitting(field: Field, value: ArrayLike) -> NDArray[Any]:
        if field.shape is None and isinstance(value, bytes):
            value = np.frombuffer(value, np.uint8)
        array = np.asarray(value)
        fits = array.ndim == 1 if field.shape is None else array.shape == field.shape
        if fits and _is_exact(array, np.dtype(field.dtype)):
            return array.astype(_little(field))
        raise ShardError(
            f"{field.name} has shape {array.shape} of {array.dtype}; the schema says "
            f"{field.shape or 'one dimension'} of {field.dtype}, and its values must fit"
        )


def _is_exact(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Floats may lose digits, integers nothing, and no kind becomes another."""
    if array.dtype.kind in "iu" and dtype.kind in "iu":
        return bool((array.astype(dtype) == array).all())
    return np.can_cast(array.dtype, dtype, "same_kind")


def _little(field: Field) -> np.dtype[Any]:
    return np.dtype(field.dtype).newbyteorder("<")


# ---------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A shard as the manifest knows it."""

    name: str
    records: int
    bytes: int
    sha256: str
    """Of the whole file."""


def shard_name(source: str, version: str) -> str:
    """The name of the shard made of one input by one version of the transformation.

    >>> shard_name("raw/a.tar", "resize-2")
    '7e4c44f27ed03172.dtps'
    """
    return hashlib.sha256(f"{version}\n{source}".encode()).hexdigest()[:16] + SUFFIX


def write_shard(
    storage: Storage, key: str, schema: Schema, samples: Iterable[Sample]
) -> ShardEntry:
    """Write all `samples` (held in memory: aim at 16 to 64 MB) as one shard.

    Raises:
        ShardError: a sample does not fit the schema.
        StorageError: the storage refused it.
    """
    content = _encode(schema, samples)
    digest = hashlib.sha256(content)
    content += digest.digest()
    digest.update(content[-_SHA_BYTES:])
    storage.write(key, bytes(content))
    records = _HEADER.unpack_from(content)[3]
    return ShardEntry(key.rpartition("/")[2], records, len(content), digest.hexdigest())


def _encode(schema: Schema, samples: Iterable[Sample]) -> bytearray:
    """All of a shard but its sha256."""
    records = [schema.encode(sample) for sample in samples]
    text = json.dumps(schema.to_json(), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    data = b"".join(records)
    offsets = np.cumsum([0, *map(len, records)], dtype="<i8")
    header = _HEADER.pack(_MAGIC, _FORMAT, _PLAIN, len(records), len(data), len(text), _BLOCK_BYTES)
    content = bytearray().join((header, text, data, bytes(-len(data) % 8), offsets.tobytes()))
    return content + _checks(memoryview(content), _BLOCK_BYTES)


def _checks(content: memoryview, block_bytes: int) -> bytes:
    blocks = range(0, len(content), block_bytes)
    sums = [zlib.crc32(content[at : at + block_bytes]) for at in blocks]
    return np.array(sums, "<u4").tobytes()


def write_manifest(
    storage: Storage, prefix: str, schema: Schema, shards: Sequence[ShardEntry]
) -> None:
    """Make the dataset below `prefix` exist. The same again is no error.

    Raises:
        ShardError: another dataset is there already.
    """
    content = {
        "format": _FORMAT,
        "schema": schema.to_json(),
        "shards": [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.name)],
    }
    data = (json.dumps(content, indent=1) + "\n").encode()
    key = _below(prefix, MANIFEST)
    try:
        storage.write_if(key, data, tag=None)
    except Conflict:
        if storage.read(key) != data:
            raise ShardError(
                f"{key} in {storage.uri} is another dataset already: choose another prefix"
            ) from None


def _below(prefix: str, name: str) -> str:
    return f"{prefix.rstrip('/')}/{name}" if prefix else name


# ---------------------------------------------------------------------------------------- reading


class Shard:
    """The records of one shard, mapped into memory; `verify` reads it once from end to end."""

    def __init__(
        self, storage: Storage, key: str, *, entry: ShardEntry | None = None, verify: bool = True
    ) -> None:
        self.key = key
        self._content = _mapped(storage, key)
        self._parse()
        if verify:
            self._verify(entry)

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, number: int) -> Arrays:
        if not 0 <= number < self.records:
            raise IndexError(number)
        start, stop = self._offsets[number : number + 2]
        return self.schema.decode(self._content[self._start + start : self._start + stop])

    @cached_property
    def table(self) -> NDArray[Any]:
        """All records as one structured array, where the schema has fields of fixed shape only."""
        return np.frombuffer(self._content, self.schema.fixed, self.records, self._start)

    def _parse(self) -> None:
        size = len(self._content)
        if size < _HEADER.size + _SHA_BYTES:
            raise ShardError(f"{self.key} is not a shard: it has {size} bytes")
        magic, version, codec, records, data, text, block = _HEADER.unpack_from(self._content)
        if magic != _MAGIC:
            raise ShardError(f"{self.key} is not a shard: it begins with {magic!r}")
        if (version, codec) != (_FORMAT, _PLAIN):
            raise ShardError(
                f"{self.key} has format {version}, codec {codec}; this dtp reads {_FORMAT} and "
                f"{_PLAIN}: use the version that wrote it, or a newer one"
            )
        self.records: int = records
        self._start = _HEADER.size + text
        index = self._start + data + -data % 8
        self._checked = index + 8 * (records + 1)
        self._block = block
        expected = self._checked + 4 * -(-self._checked // max(block, 1)) + _SHA_BYTES
        if size != expected:
            raise ShardError(f"{self.key} has {size} bytes, its header says {expected}")
        self._offsets = np.frombuffer(self._content, "<i8", records + 1, index)
        self.schema = self._parse_schema(self._content[_HEADER.size : self._start])

    def _parse_schema(self, text: memoryview) -> Schema:
        try:
            return Schema.from_json(json.loads(bytes(text)))
        except (ValueError, KeyError, TypeError):
            raise ShardError(f"{self.key} is damaged: its schema cannot be read") from None

    def _verify(self, entry: ShardEntry | None) -> None:
        digest = hashlib.sha256(self._content[:-_SHA_BYTES])
        sound = digest.digest() == self._content[-_SHA_BYTES:]
        if not sound:
            raise ShardError(f"{self.key} is damaged {self._place_of_damage()}")
        digest.update(self._content[-_SHA_BYTES:])
        if entry and digest.hexdigest() != entry.sha256:
            raise ShardError(
                f"{self.key} is whole but not the shard in the manifest: its sha256 is "
                f"{digest.hexdigest()[:12]}…, the manifest says {entry.sha256[:12]}…"
            )

    def _place_of_damage(self) -> str:
        found = np.frombuffer(_checks(self._content[: self._checked], self._block), "<u4")
        stated = np.frombuffer(self._content, "<u4", len(found), self._checked)
        bad = np.flatnonzero(found != stated)
        if not len(bad):
            return "in its checks"
        start = int(bad[0]) * self._block
        return f"between bytes {start} and {min(start + self._block, self._checked)}"


def _mapped(storage: Storage, key: str) -> memoryview:
    with storage.open(key) as file:
        with contextlib.suppress(io.UnsupportedOperation, AttributeError, ValueError):
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return memoryview(file.read())


class ShardDataset:
    """The samples of a dataset in storage, by index; a batch at a time is far quicker.

    `shard_sizes` is what `sampler.Lanes` needs to let each rank read its part of the shards only.

    Args:
        prefix: Folder of the dataset in `storage`.
        convert: Makes of the arrays of a sample, or of a batch with one more dimension in front,
            what the training loop wants; nothing by default.
        verify: Check the hash of each shard when it is first read.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str = "",
        *,
        convert: Callable[[Arrays], Any] | None = None,
        verify: bool = True,
    ) -> None:
        self._storage, self._prefix, self._verify = storage, prefix, verify
        self._convert = convert or (lambda arrays: arrays)
        self.schema, self._entries = _read_manifest(storage, _below(prefix, MANIFEST))
        self.shard_sizes = tuple(entry.records for entry in self._entries)
        self._ends = np.cumsum(self.shard_sizes, dtype=np.int64)
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number, row = self._place(np.array([index]))
        return self._convert(self._shard(int(number[0]))[int(row[0])])

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> Any:
        """A batch: arrays stacked by field; a list of samples where a field's length differs."""
        if self.schema.loose:
            return [self[int(index)] for index in indices]
        return self._convert(self._gather(np.asarray(indices, np.int64)))

    def _gather(self, indices: NDArray[np.int64]) -> Arrays:
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"samples up to {indices.max()} of {len(self)}")
        numbers, rows = self._place(indices)
        kinds = self.schema.fixed
        batch: Arrays = {
            field.name: np.empty((len(indices), *(field.shape or ())), kinds[field.name].base)
            for field in self.schema.fields
        }
        for number in np.unique(numbers):
            wanted = np.flatnonzero(numbers == number)
            table = self._shard(int(number)).table
            for name, column in batch.items():
                column[wanted] = table[name][rows[wanted]]
        return batch

    def _place(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers of the shards, and the rows within them."""
        numbers = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends - np.asarray(self.shard_sizes, np.int64)
        return numbers, indices - starts[numbers]

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            entry = self._entries[number]
            key = _below(self._prefix, entry.name)
            shard = Shard(self._storage, key, entry=entry, verify=self._verify)
            if shard.schema != self.schema or shard.records != entry.records:
                raise ShardError(f"{key} does not fit the manifest of its dataset")
            self._open[number] = shard
        return self._open[number]


def _read_manifest(storage: Storage, key: str) -> tuple[Schema, tuple[ShardEntry, ...]]:
    try:
        content = json.loads(storage.read(key))
        if content["format"] != _FORMAT:
            raise ShardError(f"{key} has format {content['format']}, this dtp reads {_FORMAT}")
        shards = tuple(ShardEntry(**shard) for shard in content["shards"])
        return Schema.from_json(content["schema"]), shards
    except NotFound:
        raise NotFound(
            f"there is no {key} in {storage.uri}: the dataset is not prepared, or not finished"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{key} in {storage.uri} is not the manifest of a dataset") from None
