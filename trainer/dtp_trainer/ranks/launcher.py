"""Start ranks and hold on to them: forked from a warm process where the command allows it.

A `RankLauncher` belongs to one agent. Whatever way a rank starts, its parent is a single-threaded
process (the shared zygote, or a private cold one that only executes) which watches the launcher's
connection: when that ends, for whatever reason, the process groups of this launcher's ranks are
killed. When the parent dies first, the kernel kills the ranks and the launcher their groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dtp_trainer.ranks import program
from dtp_trainer.ranks.bootstrap import Order, inherited
from dtp_trainer.ranks.process import (
    READY_S,
    Lost,
    Parent,
    RankExit,
    RankProcess,
    RankSpec,
    Refused,
)
from dtp_trainer.ranks.zygote import PRELOAD
from dtp_trainer.ranks.zygote_client import Unreachable, connect_cold, connect_warm, warm_path

__all__ = ["RankError", "RankExit", "RankLauncher", "RankProcess", "RankSpec", "is_forkable"]

_TRIES = 2

log = logging.getLogger("dtp.ranks")


class RankError(Exception):
    """A rank could not be started; the text says what to do, in one line."""


class RankLauncher:
    """Starts the ranks of one agent; ``async with`` or `aclose` ends them all.

    zygotes: folder for the sockets of warm processes (created, mode 0700). idle_s: how long a warm
    process stays when nobody is connected to it. preload: modules that it imports; those that are
    not installed are left out. Use a launcher from one event loop.
    """

    def __init__(
        self, *, zygotes: Path, idle_s: float = 300.0, preload: Sequence[str] = PRELOAD
    ) -> None:
        self._zygotes = zygotes
        self._idle_s = idle_s
        self._preload = tuple(preload)
        self._parents: dict[str, Parent] = {}
        self._connecting = asyncio.Lock()

    async def warm(self, spec: RankSpec) -> None:
        """Start or find the process that `start` will need for `spec`, and wait until it is ready:
        its imports take seconds when it is new. Optional; call it early, beside other work. A
        failure is not raised here: `start` will tell."""
        with contextlib.suppress(Unreachable, Lost, TimeoutError):
            parent = await self._parent(spec, warm=is_forkable(spec.argv, spec.env))
            await parent.ready()

    async def start(self, spec: RankSpec) -> RankProcess:
        """A running rank. A command or `cwd` that cannot be used shows as an exit, see `RankExit`.
        Raises `RankError` when no process can be started at all."""
        if is_forkable(spec.argv, spec.env):
            try:
                return await self._start(spec, warm=True)
            except Unreachable as error:
                log.warning("no warm process (%s): starting the rank afresh", error)
        try:
            return await self._start(spec, warm=False)
        except Unreachable as error:
            raise RankError(f"cannot start {spec.argv[0]}: {error}") from error

    async def aclose(self) -> None:
        """SIGKILL to every rank that is still there; returns when they are gone."""
        async with self._connecting:
            parents = list(self._parents.values())
            self._parents.clear()
        await asyncio.gather(*(parent.aclose() for parent in parents))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _start(self, spec: RankSpec, *, warm: bool) -> RankProcess:
        """Raises `Unreachable`, `RankError`."""
        order = Order(0, spec.argv, dict(spec.env), spec.cwd, not warm, inherited())
        for _ in range(_TRIES):
            parent = await self._parent(spec, warm=warm)
            try:
                return await parent.start(order)
            except Lost:
                log.warning("the process to fork from was killed: trying another")
            except TimeoutError:
                raise Unreachable(f"it did not answer for {READY_S:.0f} s") from None
            except Refused as error:
                raise RankError(str(error)) from None
        raise Unreachable(f"it was killed {_TRIES} times")

    async def _parent(self, spec: RankSpec, *, warm: bool) -> Parent:
        """Raises `Unreachable`."""
        path = warm_path(self._zygotes, spec.env, self._preload) if warm else None
        async with self._connecting:
            known = self._parents.get(str(path))
            if known and not known.lost:
                return known
            connection = await (
                connect_warm(path, spec.env, idle_s=self._idle_s, preload=self._preload)
                if path
                else connect_cold()
            )
            if known:
                await known.aclose()
            self._parents[str(path)] = Parent(connection, self._idle_s)
            return self._parents[str(path)]


def is_forkable(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether `command` can be forked from a warm process: ``python [-u] script.py …`` or ``python
    [-u] -m module …`` of this very interpreter, and no ``DTP_NO_ZYGOTE=1`` in `env`."""
    if env.get("DTP_NO_ZYGOTE", "0") not in ("", "0") or program.parse(command) is None:
        return False
    found = shutil.which(command[0], path=env.get("PATH", os.defpath))
    if found is None:
        return command[0] in ("python", "python3")
    # Not by the target of links alone: that is the same in every virtual environment.
    here, there = Path(sys.executable), Path(found)
    return here.parent.resolve() == there.parent.resolve() and here.resolve() == there.resolve()
