"""The way for blocking calls: one daemon thread, calls in their order, a deadline for each."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlinePassed(Exception):
    """The call was not over in time. It may still end; one that had not begun never will."""


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[], Any]
    done: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class Door:
    """Runs functions on a thread of its own. The thread starts with the first call, and being a
    daemon never delays the end of the process."""

    def __init__(self, name: str, *, deadline_s: float) -> None:
        self._name = name
        self._deadline_s = deadline_s
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result or exception. Raises `DeadlinePassed`.

        A caller that is cancelled withdraws a call that has not begun; one that has begun runs on.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._calls.put(_Call(function, done, loop))
        self._open()
        try:
            async with asyncio.timeout(self._deadline_s) as deadline:
                return await done
        except TimeoutError:
            if deadline.expired():
                raise DeadlinePassed(f"{self._name}: no answer in {self._deadline_s:g} s") from None
            raise

    def close(self) -> None:
        """The thread leaves after the calls made so far; nobody waits for it."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    def _open(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not call.done.cancelled():
                _perform(call)
            del call  # an idle thread must not keep the last call's values alive


def _perform(call: _Call) -> None:
    try:
        result, error = call.function(), None
    except BaseException as raised:  # noqa: BLE001 - it belongs to the caller, whatever it is
        result, error = None, raised
    with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
        call.loop.call_soon_threadsafe(_settle, call.done, result, error)


def _settle(done: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
