"""MNIST's own files: IDX, plain or gzipped, in a folder that the job file names.

data: {mnist: /data/mnist}
"""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtp_trainer.session.stop import SessionError
from dtp_trainer.wire import Env

_UNSIGNED_BYTES = 0x08


def mnist(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`part` is ``train`` or ``t10k``: images (n, 28, 28), labels (n,). Raises: `SessionError`."""
    folder = json.loads(os.environ.get(Env.DATA) or "{}").get("mnist")
    if not folder:
        raise SessionError("--data mnist reads a folder of IDX files: data: {mnist: /path}")
    images = read(_found(Path(folder), f"{part}-images-idx3-ubyte"))
    labels = read(_found(Path(folder), f"{part}-labels-idx1-ubyte"))
    if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1]:
        raise SessionError(
            f"{folder}: the {part} images {images.shape} do not fit the labels {labels.shape}"
        )
    return images, labels.astype(np.int64)


def read(path: Path) -> NDArray[np.uint8]:
    """An array of bytes of any shape. Raises: `SessionError`."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise SessionError(f"{path}: {error}") from None
    if len(raw) < 4 or raw[:3] != bytes((0, 0, _UNSIGNED_BYTES)):
        raise SessionError(f"{path} is no IDX file of bytes")
    start = 4 + 4 * raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != math.prod(shape):
        raise SessionError(f"{path} holds {len(raw) - start} bytes, its header says {shape}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _found(folder: Path, name: str) -> Path:
    paths = [folder / name, folder / f"{name}.gz"]
    return next((path for path in paths if path.is_file()), paths[0])
