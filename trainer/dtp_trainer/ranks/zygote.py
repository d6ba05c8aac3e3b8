"""The warm process: imports what ranks need, starts no thread, then forks a rank for whoever asks.

``python -P -m dtp_trainer.ranks.zygote --socket PATH`` serves every agent of this user on this
machine and leaves when nobody was connected for a while; ``--fd N`` is the cold form, which imports
nothing, serves one connection and only executes.

On a stream socket, messages are ``<4 bytes length><JSON>``. A client says ``{"idle_s": …}``
and then orders (`bootstrap.Order`), each with two descriptors: the rank's stdout and stderr. It
hears ``{"ready": pid, "warm": …}`` once, and of each rank ``{"id", "pid", "ticks"}`` and
``{"id", "code", "formed_group", "error"}``. When its connection ends, its ranks are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtp_trainer.ranks import bootstrap
from dtp_trainer.ranks.bootstrap import Birth, Order

PRELOAD = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch._dynamo",  # the first DistributedDataParallel imports it: 1 s
    "dtp_trainer.session",
)
_HEADER = struct.Struct("!I")
_LOOK_S = 10.0
"""An idle process looks this often whether its socket can still be found."""

log = logging.getLogger("dtp.zygote")


def frame(message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return _HEADER.pack(len(body)) + body


class Inbox:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        self._bytes += data
        while len(self._bytes) >= _HEADER.size:
            end = _HEADER.size + _HEADER.unpack_from(self._bytes)[0]
            if len(self._bytes) < end:
                return
            message = json.loads(self._bytes[_HEADER.size : end])
            del self._bytes[:end]
            yield message


def peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


@dataclass(slots=True, eq=False)
class _Client:
    socket: socket.socket
    inbox: Inbox = field(default_factory=Inbox)
    descriptors: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Child:
    id: int
    report: int
    client: _Client | None
    """None after it left."""


@dataclass(frozen=True, slots=True)
class Address:
    """A name that clients know, and the lock that makes its holder the only one. The kernel frees
    the lock with the process, so a killed one leaves nothing in the way of the next."""

    path: Path
    identity: tuple[int, int]
    listener: socket.socket
    lock: int

    def is_ours(self) -> bool:
        """Clients find us. Not so when the folder was removed, and perhaps made anew."""
        return _identity(self.path) == self.identity

    def give_up(self) -> None:
        """The name first: who takes the lock next binds it anew."""
        if self.is_ours():
            self.path.unlink(missing_ok=True)
        os.close(self.lock)


class Zygote:
    """The loop. `serve` returns in the parent when it is time to leave, and in each child with what
    that child has to become, so that a rank does not run on top of the loop's frames."""

    def __init__(self, *, address: Address | None, idle_s: float, warm: bool) -> None:
        self._address = address
        self._idle_s = idle_s
        self._warm = warm
        self._clients: set[_Client] = set()
        self._children: dict[int, _Child] = {}
        self._path = tuple(sys.path)
        self._busy_at = time.monotonic()
        # Poll, not epoll: an epoll set would be shared with every child.
        self._selector = selectors.PollSelector()
        self._wake, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self._selector.register(self._wake, selectors.EVENT_READ)
        if address:
            self._selector.register(address.listener, selectors.EVENT_READ)

    def adopt(self, connection: socket.socket) -> None:
        """Serve a connected client; another user's is closed at once."""
        if peer_uid(connection) != os.getuid():
            connection.close()
            return
        connection.setblocking(False)  # noqa: FBT003
        client = _Client(connection)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client)
        self._send(client, {"ready": os.getpid(), "warm": self._warm})

    def serve(self) -> Birth | None:
        while True:
            timeout = self._patience()
            if timeout == 0 and self._address is None:
                return None
            ready = self._selector.select(timeout)
            if timeout is None:
                self._busy_at = time.monotonic()
            for key, _ in ready:
                if birth := self._handle(key):
                    return birth
            if self._address and not self._is_wanted(self._address):
                self._retire(self._address)

    def _handle(self, key: selectors.SelectorKey) -> Birth | None:
        if isinstance(key.data, _Client):
            return self._read(key.data)
        if self._address and key.fileobj is self._address.listener:
            self._accept(self._address)
        else:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
            self._reap()
        return None

    def _patience(self) -> float | None:
        """How long to wait for something to happen."""
        if self._clients or self._children:
            return None
        return min(_LOOK_S, self._idle_s) if self._address else 0

    def _is_wanted(self, address: Address) -> bool:
        if self._clients or self._children:
            return True
        return time.monotonic() < self._busy_at + self._idle_s and address.is_ours()

    # ------------------------------------------------------------------------------- connections

    def _accept(self, address: Address) -> bool:
        try:
            connection, _ = address.listener.accept()
        except OSError:
            return False
        self.adopt(connection)
        return True

    def _retire(self, address: Address) -> None:
        """Give up the name, serve those who came in the same moment, then leave. The next client
        finds no socket and starts a successor."""
        idle_s = time.monotonic() - self._busy_at
        log.info("leaving after %.1f s (of %g) without visitors", idle_s, self._idle_s)
        address.give_up()
        while self._accept(address):
            pass
        self._selector.unregister(address.listener)
        address.listener.close()
        self._address = None

    def _read(self, client: _Client) -> Birth | None:
        try:
            data, descriptors, flags, _ = socket.recv_fds(
                client.socket, 1 << 16, 2, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError:
            data, descriptors, flags = b"", [], 0
        client.descriptors += descriptors
        if not data or flags & socket.MSG_CTRUNC:
            self._drop(client)
            return None
        try:
            return self._obey(client, data)
        except (ValueError, TypeError, KeyError) as error:
            log.warning("a client sent nonsense: %s", error)
            self._drop(client)
            return None

    def _obey(self, client: _Client, data: bytes) -> Birth | None:
        for message in client.inbox.feed(data):
            if client not in self._clients:
                return None
            if "idle_s" in message:
                self._idle_s = float(message["idle_s"])
            elif birth := self._fork(client, Order.of(message, warm=self._warm)):
                return birth
        return None

    def _drop(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        self._selector.unregister(client.socket)
        client.socket.close()
        for descriptor in client.descriptors:
            os.close(descriptor)
        for pid, child in self._children.items():
            if child.client is client:
                child.client = None
                _kill_group(pid)

    def _send(self, client: _Client, message: Mapping[str, Any]) -> None:
        """A client that leaves hundreds of messages unread is gone for all that matters."""
        try:
            client.socket.sendall(frame(message))
        except OSError:
            self._drop(client)

    # ------------------------------------------------------------------------------------- ranks

    def _fork(self, client: _Client, order: Order) -> Birth | None:
        stdout, stderr = client.descriptors[:2]
        del client.descriptors[:2]
        report, reports = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._send(client, {"id": order.id, "refused": f"cannot fork: {error.strerror}"})
            _close(stdout, stderr, report, reports)
            return None
        if pid == 0:
            self._forget()
            return Birth(order, parent, stdout, stderr, reports, self._path)
        with contextlib.suppress(OSError):  # the child does it too; whoever is first
            os.setpgid(pid, pid)
        _close(stdout, stderr, reports)
        self._children[pid] = _Child(order.id, report, client)
        self._send(client, {"id": order.id, "pid": pid, "ticks": start_ticks(pid)})
        return None

    def _forget(self) -> None:
        """In a child: close by object what belongs to the parent, lest a destructor closes a
        descriptor of the user's with the same number later."""
        self._selector.close()
        for client in self._clients:
            client.socket.close()
        if self._address:
            self._address.listener.close()
        log.handlers.clear()

    def _reap(self) -> None:
        while ended := _ended_child():
            child = self._children.pop(ended.si_pid, None)
            if child:
                # Before the rank is reaped, so that its number cannot belong to anybody else yet.
                _kill_group(ended.si_pid)
            os.waitpid(ended.si_pid, 0)
            if child:
                self._tell(child, ended)

    def _tell(self, child: _Child, ended: os.waitid_result) -> None:
        words = _last_words(child.report)
        if child.client is None:
            return
        exited = ended.si_code == os.CLD_EXITED
        code = ended.si_status if exited else -ended.si_status
        self._send(child.client, {"id": child.id, "code": code, **words})


def _ended_child() -> os.waitid_result | None:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _last_words(report: int) -> dict[str, Any]:
    """What a child left in its report. Its end is not awaited: a grandchild may hold the pipe."""
    text = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(report, 1 << 16):
            text += part
    os.close(report)
    words = {"formed_group": None, "error": None}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            words |= json.loads(line)
    return words


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def start_ticks(pid: int) -> int:
    """Start of a process in clock ticks since boot; with the pid it names a process for good."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat.rpartition(b")")[2].split()[19])


# ---------------------------------------------------------------------------------- the process


def preload(modules: Sequence[str]) -> bool:
    """Import what is there; whether forked children may run in place. A second thread forbids it
    (it would not exist in them, and its locks might be held for ever), and so does a started CUDA
    driver (it does not work in a fork)."""
    gc.disable()  # nearly all that imports make stays: looking for garbage costs a quarter of them
    for name in modules:
        began = time.monotonic()
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a module may raise anything; so will the rank's
            log.warning("without %s: %s: %s", name, type(error).__name__, error)
        else:
            log.info("imported %s in %.2f s", name, time.monotonic() - began)
    gc.enable()
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if threads > 1:
        log.warning("%d threads after the imports: every rank gets a fresh interpreter", threads)
    if started := cuda_started():
        log.warning("the imports started CUDA: every rank gets a fresh interpreter")
    return threads == 1 and not started


def cuda_started() -> bool:
    """Whether something in this process called `cuInit`."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0)


def _keep_from_children() -> None:
    """Collections in the children leave the shared pages alone, and what was made here to be
    finalized at exit (hundreds of torch's operator libraries: 30 ms) is not theirs to finalize."""
    for finalizer in getattr(weakref.finalize, "_registry", {}).values():
        finalizer.atexit = False
    sys.stdout.flush()  # or every child would print again what an import printed
    gc.freeze()


def listen(path: Path) -> Address | None:
    """The socket of this name; None when a living process has it."""
    lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(128)
    listener.setblocking(False)  # noqa: FBT003
    return Address(path, _identity(path), listener, lock)


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dtp_trainer.ranks.zygote")
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--fd", type=int)
    parser.add_argument("--preload", default="")
    parser.add_argument("--idle", type=float, default=300.0)
    return parser.parse_args()


def _log_to_stderr() -> None:
    """By a handler of this logger alone: the root logger belongs to the users' programs."""
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(message)s"))
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO)


def _serve(address: Address | None, arguments: argparse.Namespace) -> Birth | None:
    bootstrap.set_name("dtp:zygote")
    bootstrap.adopt_orphans()
    warm = preload(arguments.preload.split(",")) if arguments.preload else False
    _keep_from_children()
    zygote = Zygote(address=address, idle_s=arguments.idle, warm=warm)
    if arguments.fd is not None:
        zygote.adopt(socket.socket(fileno=arguments.fd))
    return zygote.serve()


def main() -> None:
    arguments = _arguments()
    _log_to_stderr()
    address = listen(arguments.socket) if arguments.socket else None
    if arguments.socket and address is None:
        return
    # The starter waits for the first process only: by then the socket takes connections, and nobody
    # has to reap the second.
    if os.fork():
        os._exit(0)
    birth = _serve(address, arguments)
    if birth:
        bootstrap.become(birth)


if __name__ == "__main__":
    main()
