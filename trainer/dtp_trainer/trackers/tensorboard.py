"""Event files in the job's storage that TensorBoard reads, written without TensorBoard.

The format is small and has been stable for ten years: TFRecord frames around `Event` messages. To
write it by hand costs no import, and lets a bucket, which cannot append, hold files as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from dtp_trainer.storage import FileStorage, Storage, StorageError, open_storage
from dtp_trainer.trackers.tracker import About, Row, Say
from dtp_trainer.wire import Exit

FOLDER = "tensorboard"
MACHINES = "machines"
"""A run of its own beside the job's: its steps are seconds."""
UPLOAD_EVERY_S = 30.0
LONGEST_OBJECT = 1 << 20


class TensorBoard:
    """Implements `Tracker`: one folder over all attempts."""

    def __init__(self, about: About, say: Say) -> None:
        storage = open_storage(about.storage)
        self._job = EventFile(storage, f"{FOLDER}/job", about.token)
        self._machines = EventFile(storage, f"{FOLDER}/{MACHINES}", about.token)
        self._about = about
        if about.attempt == 1 and about.term == 1 and about.start == 0:
            self._job.write(text_event(time.time(), "config", _listed(about.config)))
            place = about.folder or about.storage.rstrip("/")
            say(f"TensorBoard: tensorboard --logdir {place}/{FOLDER}")

    def log(self, row: Row) -> None:
        self._job.write(scalar_event(row.at, row.step, row.values))

    def log_machines(self, row: Row) -> None:
        self._machines.write(scalar_event(row.at, row.step, row.values))

    def go_back(self, step: int) -> None:
        self._job.write(restart_event(time.time(), step + 1))

    def checkpoint(self, name: str) -> None:
        """Nothing that it could show."""

    def tick(self) -> None:
        """A bucket that refuses gets all of it at the next try."""
        with contextlib.suppress(StorageError):
            self._job.flush()
            self._machines.flush()

    def close(self, ending: Exit | None) -> None:
        self._job.close()
        self._machines.close()


def _listed(config: Mapping[str, object]) -> str:
    return json.dumps(config, indent=2, default=str)


class EventFile:
    """Appends events below `folder`. In a bucket, whole objects that are written anew until they
    are long enough."""

    def __init__(self, storage: Storage, folder: str, token: Iterable[int]) -> None:
        self._storage, self._folder = storage, folder
        self._token = "-".join(map(str, token))
        self._count = 0
        self._key, self._buffer = "", b""
        self._file: IO[bytes] | None = None
        self._uploaded_at = time.monotonic()
        self._fresh = False
        self._begin()

    def write(self, event: bytes) -> None:
        if self._file is not None:
            self._file.write(frame(event))
        else:
            self._buffer += frame(event)
        self._fresh = True

    def flush(self, *, within_s: float = UPLOAD_EVERY_S) -> None:
        if self._file is not None:
            self._file.flush()
        elif self._fresh and time.monotonic() - self._uploaded_at >= within_s:
            self._uploaded_at = time.monotonic()
            self._storage.write(self._key, self._buffer)
            self._fresh = False
            if len(self._buffer) > LONGEST_OBJECT:
                self._begin()

    def close(self) -> None:
        self._fresh = True
        self.flush(within_s=0)
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        """Names are in the order of time, as TensorBoard reads files."""
        self._count += 1
        name = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}.{self._token}.{self._count}"
        self._key = f"{self._folder}/events.out.tfevents.{name}"
        self._buffer = b""
        self._file = self._opened()
        self.write(version_event(time.time()))

    def _opened(self) -> IO[bytes] | None:
        if not isinstance(self._storage, FileStorage):
            return None
        path = Path(self._storage.root, self._key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")


# ------------------------------------------------------------------------- messages, byte by byte


def version_event(at: float) -> bytes:
    return _event(at, 0) + _bytes(3, b"brain.Event:2")


def scalar_event(at: float, step: int, values: Mapping[str, float]) -> bytes:
    summary = b"".join(_bytes(1, _bytes(1, n.encode()) + _float(2, v)) for n, v in values.items())
    return _event(at, step) + _bytes(5, summary)


def restart_event(at: float, step: int) -> bytes:
    """Whatever was logged of this step and later ones is to be forgotten."""
    return _event(at, step) + _bytes(7, _varint(1, 1))


def text_event(at: float, tag: str, text: str) -> bytes:
    """Shown below TEXT, as Markdown; so an indented block keeps its lines."""
    block = "".join(f"    {line}\n" for line in text.splitlines())
    shape = _bytes(2, _bytes(2, _varint(1, 1)))
    tensor = _varint(1, 7) + shape + _bytes(8, block.encode())
    plugin = _bytes(1, _bytes(1, b"text"))
    value = _bytes(1, tag.encode()) + _bytes(8, tensor) + _bytes(9, plugin)
    return _event(at, 0) + _bytes(5, _bytes(1, value))


def frame(data: bytes) -> bytes:
    """A TFRecord: length, its checksum, data, its checksum."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _event(at: float, step: int) -> bytes:
    return b"\x09" + struct.pack("<d", at) + _varint(2, step)


def _varint(field: int, number: int) -> bytes:
    return _plain(field << 3) + _plain(number)


def _bytes(field: int, data: bytes) -> bytes:
    return _plain(field << 3 | 2) + _plain(len(data)) + data


def _float(field: int, number: float) -> bytes:
    try:
        packed = struct.pack("<f", number)
    except OverflowError:
        packed = struct.pack("<f", float("inf") if number > 0 else float("-inf"))
    return _plain(field << 3 | 5) + packed


def _plain(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table() -> tuple[int, ...]:
    found = []
    for number in range(256):
        crc = number
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        found.append(crc)
    return tuple(found)


_CRC = _table()


def crc32c(data: bytes) -> int:
    """Castagnoli's.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
