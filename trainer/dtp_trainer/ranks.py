"""Start ranks and hold on to them: forked from a warm process where the command allows it, executed afresh otherwise.

A `RankLauncher` belongs to one agent. Whatever way a rank starts, its parent is a small single-threaded process (the
shared zygote, or a private cold one) that watches the launcher's connection: when the connection ends, for whatever
reason, the process groups of this launcher's ranks are killed. When that parent dies first, the kernel kills the ranks
and the launcher kills what is left of their groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self


class RankError(Exception):
    """A rank could not be started; the text says what to do, in one line."""


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What one rank runs."""

    argv: tuple[str, ...]
    """As in `wire.Launch.command`: ``("python", "train.py", "--lr", "0.1")`` or ``("bash", "-c", "…")``."""
    env: Mapping[str, str]
    """The whole environment of the rank; nothing is inherited."""
    cwd: str


@dataclass(frozen=True, slots=True)
class RankExit:
    """How a rank ended."""

    code: int
    """0..255 as the rank exited, or minus the number of the signal that killed it (as `subprocess` has it)."""
    formed_group: bool | None
    """Whether `torch.distributed` ever had a process group; None when nobody could look (killed, not Python, executed afresh)."""
    error: str | None
    """One line, ``ValueError: bad lr (train.py:12)``; None without an uncaught exception that left word."""


class RankProcess:
    """A started rank. Its own process group has the same number as `pid`."""

    pid: int
    start_time: float
    """Unix time in seconds, equal to `psutil.Process(pid).create_time()`."""
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader
    """Use `read(n)`: a rank may write lines of any length. EOF comes when the whole process group is gone."""
    exit: RankExit | None
    """Set when the rank has ended."""

    async def wait(self) -> int:
        """Until the rank has ended and what it left in its process group was killed; `RankExit.code`."""
        raise NotImplementedError

    def signal(self, number: int) -> None:
        """To the whole process group; nothing when the rank has ended."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL to the whole process group; `wait` tells when it is gone."""
        raise NotImplementedError


class RankLauncher:
    """Starts the ranks of one agent; ``async with`` or `aclose` ends them all.

    zygotes: folder for the sockets of warm processes (created, mode 0700). idle_s: how long a warm process stays
    without anybody connected to it. Use it from one event loop, running in the main thread.
    """

    def __init__(self, *, zygotes: Path, idle_s: float = 300.0) -> None:
        self._zygotes = zygotes
        self._idle_s = idle_s

    async def warm(self, spec: RankSpec) -> None:
        """Start or find the parent process that `start` will need for `spec`, and wait until it is ready (its imports take
        seconds when it is new). Optional; call it early, beside other work. Never raises: `start` would tell."""
        raise NotImplementedError

    async def start(self, spec: RankSpec) -> RankProcess:
        """A running rank. A script that cannot be found, or a missing `cwd`, shows as an exit with code 127 or 126 and an
        error line. Raises `RankError` when no parent process can be started at all."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """SIGKILL to every rank that is still there; returns when they are gone."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def is_forkable(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether `command` can be forked from a warm process: ``python [-u] script.py …`` or ``python [-u] -m module …`` of
    this very interpreter, and no ``DTP_NO_ZYGOTE=1`` in `env`."""
    raise NotImplementedError
