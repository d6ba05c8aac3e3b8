"""The leader's connections to its members: one a worker, watched for silence."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection

from dtp_trainer.gang.links import Link
from dtp_trainer.gang.messages import AskPort, FromLeader, Hello, Message, Port, Pulse
from dtp_trainer.worker import steady

PULSE_S = 1.0
LOST_AFTER_S = 5.0

log = logging.getLogger("dtp.leader")


class Contacts:
    """hear: awaited with each message of a worker but answers to `ask_port`; `Hello` first, one
    after another.
    lost: called when a worker's connection ended and no newer one has taken its place.
    """

    def __init__(
        self,
        *,
        hear: Callable[[int, Message], Awaitable[None]],
        lost: Callable[[int], None],
    ) -> None:
        self._hear, self._lost = hear, lost
        self._links: dict[int, Link] = {}
        self._ports: dict[int, asyncio.Future[int]] = {}
        self._parting = asyncio.Condition()

    @property
    def workers(self) -> set[int]:
        return {*self._links}

    def send(self, worker: int, message: FromLeader) -> None:
        """Nothing when the worker is not connected."""
        if link := self._links.get(worker):
            link.send(message)

    async def ask_port(self, worker: int, ticket: int, within_s: float) -> int:
        """One that is free on the worker's host, and kept free. Raises `TimeoutError`."""
        self._ports[ticket] = asyncio.get_running_loop().create_future()
        self.send(worker, AskPort(ticket))
        try:
            async with asyncio.timeout(within_s):
                return await self._ports[ticket]
        finally:
            del self._ports[ticket]

    async def listen(self, link: Link, hello: Hello) -> None:
        """Until the connection ends. A worker that connects again has lost its older one."""
        worker = hello.worker
        if (older := self._links.get(worker)) is not None:
            older.abort()
            self._lost(worker)
        self._links[worker] = link
        await self._hear(worker, hello)
        while (message := await link.receive()) is not None and self._links.get(worker) is link:
            if isinstance(message, Port):
                self._offered(message)
            else:
                await self._hear(worker, message)
        if self._links.get(worker) is link:
            del self._links[worker]
            self._lost(worker)
        async with self._parting:
            self._parting.notify_all()

    def _offered(self, answer: Port) -> None:
        waiting = self._ports.get(answer.ticket)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer.port)

    async def keep(self) -> None:
        """For ever: pulses out; whoever was silent for too long is lost."""
        while True:
            slept_at = steady.now()
            await asyncio.sleep(PULSE_S)
            for link in self._links.values():
                link.send(Pulse())
            if steady.now() - slept_at > 2 * PULSE_S:
                continue  # This process stood still: what they sent meanwhile is not read yet.
            for worker, link in list(self._links.items()):
                if steady.now() - link.heard_at > LOST_AFTER_S:
                    log.warning("worker %d was silent for %.0f s", worker, LOST_AFTER_S)
                    link.abort()

    async def parted(self, workers: Collection[int], within_s: float) -> None:
        """Until none of these is connected, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s), self._parting:
                await self._parting.wait_for(lambda: not self.workers.intersection(workers))

    def drop(self, worker: int) -> None:
        """At once; that it is lost is known already."""
        if link := self._links.pop(worker, None):
            link.abort()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
