"""Find or start the process that forks ranks for an agent; the result is a connected socket.

Warm processes are shared and named by what they have in common with the ranks they can fork: the
interpreter, the code that was imported, and the part of the environment that is read at import.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import socket
import stat
import sys
import tempfile
from asyncio.subprocess import DEVNULL
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from dtp_trainer.ranks.zygote import peer_uid

_LONGEST_PATH = 100
"""Bytes; `sockaddr_un` holds 107."""
_CONNECT_S = 20.0

_AT_IMPORT = (
    "GLIBC_", "GOMP_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "OMP_", "PYTHON",
    "PYTORCH_", "TORCH", "TRITON_",
)  # fmt: skip
_NOT_AT_IMPORT = (
    "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONUNBUFFERED", "TORCHELASTIC_", "TORCH_FR_",
    "TORCH_NCCL_",
)  # fmt: skip
"""What a forked rank takes up by itself, or libraries when they form a process group."""
_OF_THE_USER = ("DTP_HOME", "HOME", "LOGNAME", "PATH", "TMPDIR", "USER")


class Unreachable(Exception):
    """No process to fork from; one line."""


def warm_path(folder: Path, env: Mapping[str, str], preload: Sequence[str]) -> Path:
    """The socket of the warm process for ranks with environment `env`; its folder is there. Raises
    `Unreachable`."""
    try:
        return _private(_runtime_folder(folder)) / f"{_key(env, preload)}.sock"
    except OSError as error:
        raise Unreachable(f"{error.filename or folder}: {error.strerror or error}") from error


async def connect_warm(
    path: Path, env: Mapping[str, str], *, idle_s: float, preload: Sequence[str]
) -> socket.socket:
    """A connection to the warm process at `path`, which is started if there is none and may still
    be importing. Of several that start one at once, one gets the lock and the processes of the
    others end quietly; so a start is followed by trying to connect for a while. Raises
    `Unreachable`."""
    deadline = asyncio.get_running_loop().time() + _CONNECT_S
    while (connection := _connect(path)) is None:
        if asyncio.get_running_loop().time() > deadline:
            raise Unreachable(f"{path} takes no connections; see {path.with_suffix('.log')}")
        await _start(path, env, idle_s=idle_s, preload=preload)
        await asyncio.sleep(0.01)
    return connection


async def connect_cold() -> socket.socket:
    """A connection to a new process of our own that only executes. Raises `Unreachable`."""
    ours, theirs = socket.socketpair()
    with theirs:
        arguments = ["--fd", str(theirs.fileno())]
        try:
            code = await _run(arguments, os.environ, None, (theirs.fileno(),))
        except OSError as error:
            ours.close()
            raise Unreachable(f"cannot start {sys.executable}: {error.strerror}") from error
    if code:
        ours.close()
        raise Unreachable(f"{sys.executable} -m dtp_trainer.ranks.zygote exited with {code}")
    ours.setblocking(False)  # noqa: FBT003
    return ours


def _connect(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)  # noqa: FBT003
    try:
        connection.connect(str(path))
        if peer_uid(connection) == os.getuid():
            return connection
    except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
        pass
    connection.close()
    return None


async def _start(
    path: Path, env: Mapping[str, str], *, idle_s: float, preload: Sequence[str]
) -> None:
    arguments = ["--socket", str(path), "--idle", str(idle_s), "--preload", ",".join(preload)]
    log = path.with_suffix(".log")
    try:
        with log.open("ab") as output:
            code = await _run(arguments, _environment(env), output, ())
    except OSError as error:
        raise Unreachable(f"{error.filename or log}: {error.strerror or error}") from error
    if code:
        raise Unreachable(f"the warm process ended with code {code}; see {log}")


async def _run(
    arguments: Sequence[str],
    env: Mapping[str, str],
    output: IO[bytes] | None,
    descriptors: tuple[int, ...],
) -> int:
    """Start it in a session of its own; its exit code once it has gone to the background."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "dtp_trainer.ranks.zygote", *arguments),
        stdin=DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(env),
        cwd="/",
        pass_fds=descriptors,
        start_new_session=True,
    )
    return await process.wait()


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """One thread for OpenBLAS, which would start the others when it is loaded; and a look for GPUs
    at import that does not start CUDA, which would not work in the forks."""
    user = {name: env[name] for name in _OF_THE_USER if name in env}
    ours = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return {**user, **_import_time(env), **ours}


def _import_time(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(env.items())
        if name.startswith(_AT_IMPORT) and not name.startswith(_NOT_AT_IMPORT)
    }


def _key(env: Mapping[str, str], preload: Sequence[str]) -> str:
    """Short, for the sake of the socket's path. User packages lie below HOME."""
    tops = sorted({name.partition(".")[0] for name in preload} | {"dtp_trainer"})
    code = [sys.executable, sys.version, os.getuid(), *preload, *map(_stamp, tops)]
    text = json.dumps([code, env.get("HOME"), _import_time(env)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stamp(package: str) -> int:
    """Changes when a package is installed anew (and with any edit of our own files)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return 0
    origin = Path(spec.origin)
    files = origin.parent.rglob("*.py") if package == "dtp_trainer" else (origin,)
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def _runtime_folder(folder: Path) -> Path:
    """`folder`, or a short one of this user when the path of a socket in it would be too long."""
    if len(os.fsencode(folder.absolute() / f"{'0' * 12}.sock")) <= _LONGEST_PATH:
        return folder.absolute()
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:8]
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"dtp-{os.getuid()}-{name}"


def _private(folder: Path) -> Path:
    """Nobody else may offer a socket there: who connects hands over his environment."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise Unreachable(f"{folder} is not a folder of this user; remove it")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder
