"""A TCP port that is kept free for a rank: bound by its agent, to be listened at by the rank."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import psutil


class HeldPort:
    """As long as it is held, no other program is given this port by the kernel.

    A server that sets SO_REUSEADDR, as torch's store does, can listen there all the same, because
    nobody listens at the socket that holds it.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", 0))
        self.number: int = self._socket.getsockname()[1]

    def release(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def reaches(pids: Iterable[int], port: int) -> bool:
    """Whether one of these processes is connected to somebody's `port`."""
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.raddr and connection.raddr.port == port:
                    return True
    return False
