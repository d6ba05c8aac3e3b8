"""put, get, list, put-if by URI. Files here; `s3` has the same for buckets."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import unquote, urlsplit


class StorageError(Exception):
    """What, which key, and what to do next, in one line."""


class NotFound(StorageError):
    pass


class Unreadable(StorageError):
    """The medium failed while this key was read; trying again is not expected to help."""


class Conflict(StorageError):
    """`write_if` found another content than the caller had seen."""


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    bytes: int
    modified_at: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Tagged:
    data: bytes
    tag: str
    """Names this content; an opaque string (S3: the ETag)."""


class Storage(Protocol):
    """Keys are relative, with ``/``. Blocking; thread-safe.

    Every write is atomic: readers see the old content or the new one.
    """

    uri: str

    def read(self, key: str) -> bytes: ...

    def read_tagged(self, key: str) -> Tagged: ...

    def open(self, key: str) -> IO[bytes]:
        """For large objects; the caller closes it."""
        ...

    def write(self, key: str, data: bytes) -> None: ...

    def write_if(self, key: str, data: bytes, *, tag: str | None) -> str:
        """Write when the content is still the one named by `tag` (None: when there is none).

        Returns the new tag. Raises `Conflict`.
        """
        ...

    def create(self, key: str) -> AbstractContextManager[IO[bytes]]:
        """A writer for large objects.

        The object appears, whole and durable, when the block ends without an error.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All keys that start with the string `prefix`, in the order of their names."""
        ...

    def delete(self, prefix: str) -> None:
        """The key itself or everything below ``prefix/``; what is not there is not an error."""
        ...


def open_storage(uri: str) -> Storage:
    """A storage for ``file:///path``, a plain path or ``s3://bucket/prefix``.

    Nothing is asked of it yet; a folder is made by the first write, a bucket never.

    Raises:
        StorageError: the URI names something else.
    """
    parts = urlsplit(uri)
    if parts.scheme == "s3" and parts.netloc and not parts.query:
        from dtp_trainer.s3 import S3Storage  # noqa: PLC0415 - which this module is the base of

        return S3Storage(parts.netloc, parts.path)
    if "://" not in uri:
        return FileStorage(Path(uri).expanduser())
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return FileStorage(Path(unquote(parts.path)))
    raise StorageError(
        f"cannot open storage {uri!r}: use file:///an/absolute/path, the plain path of a folder, "
        "or s3://bucket/prefix"
    )


def check_key(key: str) -> list[str]:
    """The names that `key` joins. Raises `StorageError` for one that is no key anywhere."""
    parts = key.split("/")
    safe = all(part not in ("", ".", "..") and not part.startswith(_OWN) for part in parts)
    if not safe or "\0" in key:
        raise StorageError(
            f"{key!r} is not a key: use relative names joined by '/', none of them empty, "
            f"'.', '..' or beginning with {_OWN!r}"
        )
    return parts


# -------------------------------------------------------------------------------------------- files

_OWN = ".dtp-"
_TEMPORARY = f"{_OWN}tmp-"
_LOCK = f"{_OWN}lock-"
_LOCK_DEADLINE_S = 30.0
_BUFFER_BYTES = 1 << 20


class FileStorage:
    """Objects are files below `root`.

    A write goes to a temporary file in `root`, which its writer keeps locked; so a temporary file
    that can be locked was left by a dead writer, on any machine that shares the folder, and the
    first write of the next storage there removes it. All of `root` must be one file system.

    `write_if` compares under a lock file beside the target. Keys that are changed by `write_if`
    must be changed by nothing else: a plain `write` takes no lock.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow links
        self.uri = self.root.as_uri()
        self._swept = False

    def __repr__(self) -> str:
        return f"FileStorage({str(self.root)!r})"

    def read(self, key: str) -> bytes:
        with self.open(key) as file, _reading(key, self.root):
            return file.read()

    def read_tagged(self, key: str) -> Tagged:
        data = self.read(key)
        return Tagged(data, _tag(data))

    def open(self, key: str) -> IO[bytes]:
        with _reading(key, self.root):
            return self._path(key).open("rb")

    def write(self, key: str, data: bytes) -> None:
        with self.create(key) as file:
            file.write(data)

    def write_if(self, key: str, data: bytes, *, tag: str | None) -> str:
        path = self._path(key)
        with _explained("write", key, self.root):
            _make_folder(path.parent)
            with _locked(path):
                self._compare(key, tag)
                self.write(key, data)
        return _tag(data)

    @contextmanager
    def create(self, key: str) -> Iterator[IO[bytes]]:
        path = self._path(key)
        with _explained("write", key, self.root):
            _make_folder(self.root)
            self._sweep_once()
            temporary, file = _open_temporary(self.root)
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                _make_folder(path.parent)
                temporary.replace(path)
                _sync_folder(path.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                with contextlib.suppress(OSError):  # a full disk refuses the buffer's rest again
                    file.close()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder, _, _ = prefix.rpartition("/")
        base = self._path(folder) if folder else self.root
        with _explained("list", prefix or "the keys", self.root):
            for entry in _walk(base, f"{folder}/" if folder else ""):
                if entry.key.startswith(prefix):
                    yield entry

    def delete(self, prefix: str) -> None:
        path = self._path(prefix.rstrip("/"))
        with _explained("delete", prefix, self.root):
            if path.is_dir() and not path.is_symlink():
                self._delete_folder(path)
            elif path.is_symlink() or path.exists():
                path.unlink(missing_ok=True)
                _sync_folder(path.parent)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*check_key(key))

    def _compare(self, key: str, tag: str | None) -> None:
        try:
            found = self.read_tagged(key).tag
        except NotFound:
            found = None
        if found != tag:
            raise Conflict(f"{key} in {self.root} was changed by another writer; read it again")

    def _sweep_once(self) -> None:
        if not self._swept:
            self._swept = True
            sweep_temporaries(self.root)

    def _delete_folder(self, folder: Path) -> None:
        """Out of sight in one step, then away; what a kill leaves in between is swept later."""
        doomed = self.root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            folder.rename(doomed)
            _sync_folder(folder.parent)
            shutil.rmtree(doomed, ignore_errors=True)


def sweep_temporaries(folder: Path) -> None:
    """Remove what dead writers left in `folder`; files of living ones are locked and stay."""
    with os.scandir(folder) as entries:
        left = [Path(e.path) for e in entries if e.name.startswith(_TEMPORARY)]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _open_temporary(folder: Path) -> tuple[Path, IO[bytes]]:
    while True:
        path = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        file = path.open("xb", buffering=_BUFFER_BYTES)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # swept between its creation and its lock


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The exclusive right to compare and replace `path`, among threads and processes."""
    name = hashlib.sha256(path.name.encode()).hexdigest()[:16]
    lock = path.with_name(f"{_LOCK}{name}")
    deadline = time.monotonic() + _LOCK_DEADLINE_S
    while True:
        with lock.open("ab") as file:
            _acquire(file, lock, deadline)
            if not _is_same_file(file, lock):
                continue  # its folder was deleted, and perhaps made anew, while we waited
            try:
                yield
            finally:
                # Not left to close(): a child forked meanwhile holds a copy of the descriptor.
                fcntl.flock(file, fcntl.LOCK_UN)
            return


def _acquire(file: IO[bytes], lock: Path, deadline: float) -> None:
    pause_s = 0.0005
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{lock} has been locked for {_LOCK_DEADLINE_S:.0f} s: a process that writes "
                    f"there is stopped or stuck; find it with `fuser {lock}`"
                ) from None
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.02)
        else:
            return


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _make_folder(folder: Path) -> None:
    """Like ``mkdir -p``, and as durable as the file that will lie in it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: Path, prefix: str) -> Iterator[Entry]:
    try:
        with os.scandir(folder) as found:
            entries = [(e, e.is_dir(follow_symlinks=False)) for e in found]
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry, is_folder in sorted(entries, key=lambda pair: pair[0].name + "/" * pair[1]):
        if entry.name.startswith(_OWN):
            continue
        if is_folder:
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
            continue
        with contextlib.suppress(FileNotFoundError):
            stat = entry.stat()
            yield Entry(f"{prefix}{entry.name}", stat.st_size, stat.st_mtime)


# ------------------------------------------------------------------------------------------- errors

_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space there",
    errno.EDQUOT: "the disk quota is used up; free some space there",
    errno.EFBIG: "the file is larger than this process or file system allows; see `ulimit -f`",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "permission denied; check owner and mode of the folder",
    errno.EPERM: "permission denied; check owner and mode of the folder",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.EEXIST: "a part of its path is a file, not a folder",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "a folder has that name",
    errno.EIO: "the disk reports an error; check it before going on",
}


@contextmanager
def _explained(verb: str, key: str, root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0) or error.strerror or str(error)
        kind = Unreadable if error.errno == errno.EIO and verb == "read" else StorageError
        raise kind(f"cannot {verb} {key} in {root}: {cause}") from error


@contextmanager
def _reading(key: str, root: Path) -> Iterator[None]:
    with _explained("read", key, root):
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(f"there is no {key} in {root}") from None
