"""A worker's part in its gang: it runs the ranks that its leader tells it to, and reports."""

from __future__ import annotations

import asyncio
from typing import assert_never

from dtp_trainer.gang.links import Link
from dtp_trainer.gang.messages import (
    AskPort,
    Beat,
    Dismiss,
    Drain,
    FromLeader,
    Hello,
    Kill,
    Leaving,
    Port,
    Profile,
    Pulse,
    RankExited,
    RanksGone,
    Start,
)
from dtp_trainer.gang.ports import HeldPort, reaches
from dtp_trainer.ranks.launcher import RankLauncher
from dtp_trainer.wire import Host, Launch, Window
from dtp_trainer.worker.crew import Crew
from dtp_trainer.worker.hosts import listens
from dtp_trainer.worker.launching import TORCHRUN, launcher_of
from dtp_trainer.worker.lines import Lines

BEAT_S = 1.0
LOST_AFTER_S = 5.0
LISTENING_S = (0.1, 0.2, 0.3, 0.5)
"""When, after the start of ranks, to look whether they formed a process group; then every beat."""


class Member:
    """Serves one leader after another, with one crew at a time."""

    def __init__(self, launch: Launch, *, launcher: RankLauncher, lines: Lines) -> None:
        self._launch, self._launcher, self._lines = launch, launcher, lines
        self._link: Link | None = None
        self._crew: Crew | None = None
        self._running: asyncio.Task[None] | None = None
        self._held: HeldPort | None = None
        self._window: Window | None = None
        self._host: Host | None = None
        self._formed_group = False
        self._generation = self._reached = 0
        self.leaving = False
        self.unfit = ""
        """Why this worker can start no ranks, once that is known."""

    @property
    def in_gang(self) -> bool:
        """A leader listens, so it will say when to go."""
        return self._link is not None

    @property
    def rank_pids(self) -> tuple[int, ...]:
        return self._crew.pids if self._crew else ()

    def leave(self) -> None:
        """This worker was asked to stop."""
        self.leaving = True
        self._send(Leaving())

    def sampled(self, host: Host) -> None:
        self._host = host
        self._lines.record(host)

    def kill(self, *, late: bool = False) -> None:
        """With `late`, because ranks did not leave in time."""
        if self._crew is not None:
            self._crew.kill(late=late)

    async def serve(self, link: Link) -> Dismiss | None:
        """Obey until dismissed; None when the leader was lost. No rank is left when it returns."""
        self._link = link
        launch = self._launch
        link.send(
            Hello(
                launch.worker,
                launch.host,
                launch.nproc_per_node,
                launch.workers,
                self.leaving,
                self.unfit,
                self._generation,
                self._reached,
            )
        )
        beating = asyncio.create_task(self._beat_always())
        try:
            return await self._obey(link)
        finally:
            beating.cancel()
            self._link = None
            link.close()
            await self._end_crew()

    async def _obey(self, link: Link) -> Dismiss | None:
        while True:
            try:
                async with asyncio.timeout(LOST_AFTER_S):
                    message = await link.receive()
            except TimeoutError:
                return None
            match message:
                case None:
                    return None
                case Dismiss():
                    return message
                case AskPort() | Start() | Drain() | Kill() | Profile() | Pulse():
                    await self._do(message)
                case _:
                    return None

    async def _do(self, order: FromLeader) -> None:
        match order:
            case AskPort(ticket):
                self._send(Port(ticket, self._hold_port()))
            case Start():
                await self._start(order)
            case Drain(generation):
                if self._crew is not None and self._crew.order.generation == generation:
                    self._crew.drain()
            case Kill(generation, dump):
                if self._crew is not None and self._crew.order.generation == generation:
                    self._crew.kill(dump=dump)
            case Profile(generation, ask):
                if self._crew is not None and self._crew.order.generation == generation:
                    self._crew.pass_on(ask)
            case Dismiss() | Pulse():
                pass
            case _:
                assert_never(order)

    def _hold_port(self) -> int:
        if self._held is not None:
            self._held.release()
        self._held = HeldPort()
        return self._held.number

    # ---------------------------------------------------------------------------------------- crew

    async def _start(self, order: Start) -> None:
        """An order for a generation that is not newer than the last is from a leader long gone."""
        if order.generation <= self._generation:
            return
        await self._end_crew()
        self._generation, self._reached = order.generation, 0
        self._window = None
        self._crew = Crew(
            self._launch,
            order,
            launcher=launcher_of(self._launch, order, self._launcher),
            lines=self._lines,
            exited=self._exited,
            stepped=self._stepped,
        )
        self._running = asyncio.create_task(self._run(self._crew))

    async def _run(self, crew: Crew) -> None:
        watching = asyncio.create_task(self._watch_for_group(crew))
        try:
            await crew.run()
        except OSError as error:
            self._send(crew.failed(str(error)))
        except Exception as error:  # noqa: BLE001 - the leader waits for word of these ranks
            self._send(crew.failed(f"{type(error).__name__}: {error}"))
        finally:
            watching.cancel()
        self._beat()
        self._send(RanksGone(crew.order.generation))

    async def _end_crew(self) -> None:
        if self._crew is not None and self._running is not None:
            self._crew.kill()
            await asyncio.wait([self._running])
            self._reached = self._crew.reached
        self._crew = self._running = None

    def _exited(self, exited: RankExited) -> None:
        self._beat()
        self._send(exited)

    def _stepped(self, window: Window) -> None:
        first = self._window is None
        self._window = window
        self._lines.record(window)
        if first or window.rank == 0:  # the leader keeps each window of the job
            self._beat()

    async def _watch_for_group(self, crew: Crew) -> None:
        """A rank that listens at the master port (with torchrun: is connected to it) formed a
        process group; warm ranks tell by themselves, others cannot."""
        if crew.order.first_rank != 0:
            return
        waits = [*LISTENING_S]
        while not (self._formed_group or crew.reporting):
            await asyncio.sleep(waits.pop(0) if waits else BEAT_S)
            pids, port = crew.pids, crew.order.master_port
            look = reaches if self._launch.launcher == TORCHRUN else listens
            self._formed_group = await asyncio.to_thread(look, pids, port)

    # --------------------------------------------------------------------------------------- beats

    async def _beat_always(self) -> None:
        while True:
            self._beat()
            await asyncio.sleep(BEAT_S)

    def _beat(self) -> None:
        crew = self._crew
        if crew is None:
            self._send(Beat(host=self._host))
            return
        self._send(
            Beat(
                generation=crew.order.generation,
                steps=crew.steps,
                reporting=crew.reporting,
                window=self._window,
                phases=crew.folder.phases,
                host=self._host,
                formed_group=self._formed_group,
                effort=crew.effort,
            )
        )

    def _send(self, message: Leaving | Port | RankExited | RanksGone | Beat) -> None:
        if self._link is not None:
            self._link.send(message)
