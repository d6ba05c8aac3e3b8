"""Files of tensors in the safetensors format, hashed while they are written or read.

One flat buffer in memory is laid out as the data section of its file, so that taking the tensors is
one pass of copies and writing them is one pass over one buffer.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Tensors: TypeAlias = Mapping[str, torch.Tensor]
Signature: TypeAlias = tuple[tuple[str, torch.dtype, torch.Size], ...]

CHUNK_BYTES = 4 << 20
_LONGEST_HEADER = 512 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


class Malformed(ValueError):
    """The bytes are no whole file of tensors; the message says where they go wrong."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor lies in the data section of a file, in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


Room: TypeAlias = Callable[[Span], torch.Tensor]
"""Memory, as a contiguous tensor of bytes, for what a span holds."""


def supported(dtype: torch.dtype) -> bool:
    return dtype in _DTYPES


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors calls it."""
    return _DTYPES[dtype]


def dtype_called(name: str) -> torch.dtype:
    """Raises KeyError when safetensors knows no such name."""
    return _BY_NAME[name]


def own_room(span: Span) -> torch.Tensor:
    return torch.empty(span.stop - span.start, dtype=torch.uint8)


def shares(tensors: Tensors, world_size: int) -> list[list[str]]:
    """The names of the tensors by the rank that writes them: whole tensors, about equal bytes.

    Depends on names and sizes alone, so every rank finds the same shares.
    """
    dealt: list[list[str]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(name)
        heapq.heappush(loads, (load + tensors[name].nbytes, rank))
    return dealt


def signature(tensors: Tensors) -> Signature:
    """Equal for tensors that fit the same layout."""
    return tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


def laid_out(tensors: Tensors) -> tuple[Span, ...]:
    """The spans of `tensors`, without gaps; larger elements first, so that all are aligned."""
    spans: list[Span] = []
    start = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.element_size()
        spans.append(Span(name, tensor.dtype, tuple(tensor.shape), start, stop))
        start = stop
    return tuple(spans)


class Staging:
    """A buffer in memory that holds tensors until they are written; allocated once and reused."""

    def __init__(self) -> None:
        self.free()

    def free(self) -> None:
        """Give the memory back; the next `take` or `fit` allocates anew."""
        self.spans: tuple[Span, ...] = ()
        self._signature: Signature | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, torch.Tensor] = {}

    @property
    def data(self) -> memoryview:
        """The data section of the file."""
        size = self.spans[-1].stop if self.spans else 0
        return self._buffer[:size].numpy().data

    def take(self, tensors: Tensors) -> None:
        """Copy `tensors` into the buffer. Allocates only when they do not fit as the last did."""
        self.fit(tensors)
        on_device = False
        for name, tensor in tensors.items():
            if tensor.is_cpu and tensor.is_contiguous():
                # Not copy_(): it waits for all of torch's threads, which takes fifty times as long
                # where ranks share their cores.
                np.copyto(_bytes_of(self._views[name]), _bytes_of(tensor))
            else:
                self._views[name].copy_(tensor, non_blocking=tensor.is_cuda)
            on_device |= tensor.is_cuda
        if on_device:
            torch.cuda.synchronize()

    def fit(self, tensors: Tensors) -> None:
        """Lay the buffer out for `tensors` and touch its pages."""
        wanted = signature(tensors)
        if wanted == self._signature:
            return
        self.spans = laid_out(tensors)
        size = self.spans[-1].stop if self.spans else 0
        if size > self._buffer.numel():
            pinned = any(tensor.is_cuda for tensor in tensors.values())
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            self._buffer.numpy().fill(0)
        self._views = {s.name: _view(self._buffer[s.start : s.stop], s) for s in self.spans}
        self._signature = wanted


def write(file: IO[bytes], spans: tuple[Span, ...], data: memoryview) -> tuple[int, str]:
    """Write a whole file; its bytes and sha256."""
    header = _encode_header(spans)
    digest = hashlib.sha256(header)
    file.write(header)
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        file.write(chunk)
        digest.update(chunk)
    return len(header) + len(data), digest.hexdigest()


def read(
    file: IO[bytes], size: int, *, room: Room = own_room
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a file of `size` bytes, each in the memory that `room` gives for it (by
    default its own), and the file's sha256.

    Raises:
        Malformed: it is shorter, longer or something else.
    """
    reader = file if isinstance(file, io.BufferedIOBase) else io.BufferedReader(file)  # type: ignore[type-var]
    digest = hashlib.sha256()
    tensors: dict[str, torch.Tensor] = {}
    for span in _read_header(reader, size, digest):
        memory = room(span)
        _fill(reader, memory.numpy().data, digest)
        tensors[span.name] = _view(memory, span)
    if reader.read(1):
        raise Malformed(f"is longer than {size} bytes")
    return tensors, digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _view(memory: torch.Tensor, span: Span) -> torch.Tensor:
    return memory.view(span.dtype).reshape(span.shape)


def _encode_header(spans: tuple[Span, ...]) -> bytes:
    entries = {
        span.name: {
            "dtype": _DTYPES[span.dtype],
            "shape": list(span.shape),
            "data_offsets": [span.start, span.stop],
        }
        for span in spans
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(file: io.BufferedIOBase, size: int, digest: Any) -> Iterator[Span]:
    prefix = bytearray(8)
    _fill(file, memoryview(prefix), digest)
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise Malformed("has a header longer than itself")
    text = bytearray(length)
    _fill(file, memoryview(text), digest)
    at = 0
    for span in _parse_header(bytes(text)):
        bytes_needed = math.prod(span.shape) * span.dtype.itemsize
        if span.start != at or span.stop != at + bytes_needed or span.stop > size - 8 - length:
            raise Malformed(f"has a header in which {span.name} does not fit")
        at = span.stop
        yield span
    if 8 + length + at != size:
        raise Malformed(f"holds {8 + length + at} bytes of tensors instead of {size}")


def _parse_header(text: bytes) -> list[Span]:
    try:
        entries = json.loads(text)
        spans = [_parse_span(n, e) for n, e in entries.items() if n != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Malformed("has a header that is not that of a safetensors file") from None
    return sorted(spans, key=lambda span: (span.start, span.stop))


def _parse_span(name: str, entry: Any) -> Span:
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError
    return Span(name, _BY_NAME[entry["dtype"]], shape, start, stop)


def _fill(file: io.BufferedIOBase, memory: memoryview, digest: Any) -> None:
    filled = 0
    while filled < len(memory):
        part = memory[filled : filled + CHUNK_BYTES]
        count = file.readinto(part)
        if not count:
            raise Malformed("ends too early")
        digest.update(part[:count])
        filled += count
