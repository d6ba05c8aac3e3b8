"""A started rank as its agent holds it, and the connection to the process that forked it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from dtp_trainer.ranks.bootstrap import Order
from dtp_trainer.ranks.zygote import Inbox, frame

READY_S = 120.0
"""Torch takes 2 to 10 s to import; a cold disk can take ten times that."""
_GONE_S = 5.0

log = logging.getLogger("dtp.ranks")


class Lost(Exception):
    """The process to fork from ended while it was asked for a rank."""


class Refused(Exception):
    """The process to fork from could not; one line."""


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What one rank runs."""

    argv: tuple[str, ...]
    """As `wire.Launch.command`: ``("python", "train.py")``, ``("bash", "-c", "…")``."""
    env: Mapping[str, str]
    """The whole environment of the rank; nothing is inherited."""
    cwd: str


@dataclass(frozen=True, slots=True)
class RankExit:
    """How a rank ended."""

    code: int
    """0..255 as it exited, or minus the number of the signal that killed it (as in `subprocess`).
    As in a shell: 127 the command was not found, 126 it or `cwd` could not be used."""
    formed_group: bool | None
    """Whether `torch.distributed` ever had a process group; None where nobody could look: killed
    before it had one, or executed afresh."""
    error: str | None
    """One line, ``ValueError: bad lr (train.py:12)``; None when none was reported."""


class RankProcess:
    """A started rank. It leads a process group with the number `pid`."""

    pid: int
    start_time: float
    """Unix time in seconds, equal to `psutil.Process(pid).create_time()`."""
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader
    """Use `read(n)`: a rank may write lines of any length. They end when the rank has ended, unless
    one of its descendants left for a session of its own and keeps them open."""

    def __init__(
        self,
        pid: int,
        start_time: float,
        output: tuple[asyncio.StreamReader, asyncio.StreamReader],
        ending: asyncio.Future[RankExit],
    ) -> None:
        self.pid = pid
        self.start_time = start_time
        self.stdout, self.stderr = output
        self._exit = ending

    @property
    def exit(self) -> RankExit | None:
        """None while the rank runs."""
        return self._exit.result() if self._exit.done() else None

    async def wait(self) -> int:
        """Until the rank has ended and its process group with it; `RankExit.code`."""
        return (await asyncio.shield(self._exit)).code

    def signal(self, number: int) -> None:
        """To the whole process group; nothing when the rank has ended."""
        if not self._exit.done():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the whole process group; `wait` tells when it is gone."""
        self.signal(signal.SIGKILL)


class Parent:
    """A connected process that forks ranks for us. Must be made in a running event loop."""

    def __init__(self, connection: socket.socket, idle_s: float) -> None:
        self.lost = False
        self._socket = connection
        self._sending = asyncio.Lock()
        self._idle_s = idle_s
        self._ids = itertools.count(1)
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._starting: dict[int, tuple[asyncio.Future[RankProcess], _Output]] = {}
        self._ranks: dict[int, tuple[RankProcess, asyncio.Future[RankExit]]] = {}
        self._outputs: list[_Output] = []
        self._reading = asyncio.create_task(self._read())

    async def ready(self) -> None:
        """Its imports are done. Raises `Lost`, `TimeoutError`."""
        async with asyncio.timeout(READY_S):
            await asyncio.shield(self._ready)

    async def start(self, order: Order) -> RankProcess:
        """The rank of an order, which gets its `id` here. Raises as `ready`, and `Refused`."""
        await self.ready()
        output = await _Output.open()
        self._outputs = [known for known in self._outputs if not known.at_end()] + [output]
        number = next(self._ids)
        started: asyncio.Future[RankProcess] = asyncio.get_running_loop().create_future()
        self._starting[number] = (started, output)
        try:
            # A task of its own: a message cut short by a cancellation would spoil the connection.
            order = dataclasses.replace(order, id=number)
            async with asyncio.timeout(READY_S):
                await asyncio.shield(asyncio.create_task(self._send(order, output)))
                return await started
        except BaseException:
            _abandon(started)
            output.close()
            raise

    async def aclose(self) -> None:
        """Kill the ranks, wait for their end, disconnect."""
        ranks = list(self._ranks.values())
        for rank, _ in ranks:
            rank.kill()
        if ranks:
            await asyncio.wait([ending for _, ending in ranks], timeout=_GONE_S)
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self._socket.close()
        for output in self._outputs:
            output.close()

    # ---------------------------------------------------------------------------------- the wire

    async def _send(self, order: Order, output: _Output) -> None:
        message = frame(dataclasses.asdict(order))
        async with self._sending:
            try:
                sent = socket.send_fds(self._socket, [message], output.write_ends)
                await asyncio.get_running_loop().sock_sendall(self._socket, message[sent:])
            except OSError:
                self._lose()
            finally:
                output.hand_over()

    async def _read(self) -> None:
        inbox = Inbox()
        try:
            self._socket.send(frame({"idle_s": self._idle_s}))
            while data := await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16):
                for message in inbox.feed(data):
                    self._hear(message)
        except OSError as error:
            log.info("lost the process to fork from: %s", error)
        finally:
            self._lose()
        await asyncio.gather(*(_orphaned(*known) for known in self._ranks.values()))

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "ready" in message:
            self._ready.set_result(None)
        elif "refused" in message:
            _fail(self._starting.pop(message["id"])[0], Refused(message["refused"]))
        elif "pid" in message:
            self._started(message["id"], message["pid"], message["ticks"])
        else:
            _, ending = self._ranks.pop(message["id"])
            ending.set_result(RankExit(message["code"], message["formed_group"], message["error"]))

    def _started(self, number: int, pid: int, ticks: int) -> None:
        started, output = self._starting.pop(number)
        at = ticks / os.sysconf("SC_CLK_TCK") + psutil.boot_time()
        ending: asyncio.Future[RankExit] = asyncio.get_running_loop().create_future()
        rank = RankProcess(pid, at, output.readers, ending)
        self._ranks[number] = (rank, ending)
        if started.cancelled():
            rank.kill()
        else:
            started.set_result(rank)

    def _lose(self) -> None:
        self.lost = True
        _fail(self._ready, Lost())
        for started, _ in self._starting.values():
            _fail(started, Lost())
        self._starting.clear()


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # marks it as seen: nobody may be waiting


def _abandon(started: asyncio.Future[RankProcess]) -> None:
    """Nobody will take this rank: it is killed, now or when it is there."""
    if not started.cancel() and not started.exception():
        started.result().kill()


async def _orphaned(rank: RankProcess, ending: asyncio.Future[RankExit]) -> None:
    """The parent is gone, so nobody reports; the kernel has killed the rank, its group is left."""
    rank.kill()
    deadline = asyncio.get_running_loop().time() + _GONE_S
    # Not our child: there is nothing to wait on.
    while _alive(rank.pid) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    ending.set_result(
        RankExit(-signal.SIGKILL, None, "the process that it was forked from was killed")
    )


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class _Output:
    """The two pipes of a rank; we read, and the write ends wait to be handed over."""

    def __init__(self) -> None:
        self.readers = (asyncio.StreamReader(), asyncio.StreamReader())
        self.write_ends: tuple[int, ...] = ()
        self._transports: list[asyncio.ReadTransport] = []

    @classmethod
    async def open(cls) -> _Output:
        output = cls()
        try:
            for reader in output.readers:
                await output._attach(reader)
        except BaseException:
            output.hand_over()
            output.close()
            raise
        return output

    async def _attach(self, reader: asyncio.StreamReader) -> None:
        read, write = os.pipe()
        self.write_ends += (write,)
        pipe = os.fdopen(read, "rb", buffering=0)
        try:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
        except BaseException:
            pipe.close()
            raise
        self._transports.append(transport)

    def hand_over(self) -> None:
        for descriptor in self.write_ends:
            os.close(descriptor)
        self.write_ends = ()

    def at_end(self) -> bool:
        return all(transport.is_closing() for transport in self._transports)

    def close(self) -> None:
        for transport in self._transports:
            transport.close()
