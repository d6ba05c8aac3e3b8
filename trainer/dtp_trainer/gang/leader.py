"""The leader of a gang: hears its members, asks `gang.step` what to do, does it, and publishes.

Its own worker is a member like any other, over a connection to itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import assert_never

from dtp_trainer.checkpoints import heads
from dtp_trainer.gang import links
from dtp_trainer.gang import rules as gang
from dtp_trainer.gang.auditor import auditing
from dtp_trainer.gang.contacts import Contacts
from dtp_trainer.gang.messages import Beat as MemberBeat
from dtp_trainer.gang.messages import (
    Dismiss,
    Drain,
    Hello,
    Kill,
    Leaving,
    Message,
    RankExited,
    RanksGone,
    Start,
)
from dtp_trainer.gang.office import Deposed, Office, raise_fence, unseen
from dtp_trainer.gang.recorder import Recorder
from dtp_trainer.gang.state import (
    Committed,
    DismissWorker,
    DrainRanks,
    Drop,
    End,
    Input,
    KillRanks,
    Lost,
    Output,
    Prepare,
    Prepared,
    Resign,
    Said,
    StartSeat,
    State,
    Tick,
    Unprepared,
)
from dtp_trainer.gang.wishes import Wishes
from dtp_trainer.storage import Storage, StorageError
from dtp_trainer.wire import Exit, ExitCode, Launch
from dtp_trainer.worker import steady

PUBLISH_EVERY_S = 1.0
ANSWER_S = 5.0
GOODBYE_S = 3.0
RETRY_S = 0.2

log = logging.getLogger("dtp.leader")


def _start_of(order: StartSeat) -> Start:
    return Start(
        generation=order.generation,
        world_size=order.world_size,
        first_rank=order.seat.first_rank,
        group_rank=order.seat.group_rank,
        group_world_size=order.group_world_size,
        master_addr=order.master_addr,
        master_port=order.master_port,
        restart_count=order.restart_count,
    )


class Leader:
    """Leads from `run` until the gang has ended, this worker left, or another leader took over.

    recorder: told of each event after number `told`, once, and of every beat.
    """

    def __init__(
        self,
        launch: Launch,
        storage: Storage,
        office: Office,
        state: State,
        recorder: Recorder,
        *,
        told: int = 0,
    ) -> None:
        self._launch, self._storage, self._office = launch, storage, office
        self._recorder = recorder
        self._state = state
        self._contacts = Contacts(hear=self._hear, lost=lambda worker: self._feed(Lost(worker)))
        self._wishes = Wishes(storage)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._news = asyncio.Event()
        self._told = told
        self._trouble = ""
        """What storage said last, when it refused."""
        self._failure: Exception | None = None

    async def run(self) -> None:
        """Members stay connected until `close`, so that nobody stands for election before it is
        written down how this leadership ended.

        Raises whatever a mistake of ours raised, in whichever task or timer that was.
        """
        self._tell_news()
        self._spawn(self._publish_always())
        self._spawn(self._contacts.keep())
        self._set_timer()
        try:
            with auditing(self._storage, self._feed):
                await self._over.wait()
        finally:
            if self._timer:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._contacts.close()

    @property
    def ending(self) -> Exit | None:
        """How the attempt ended; None while it goes on, with this leader or another one."""
        outcome, detail = self._state.outcome, self._state.detail
        return None if outcome is None else Exit(time.time(), self._state.me, outcome, detail)

    # ------------------------------------------------------------------------------------- members

    async def welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection: prove, greet, listen until it ends."""
        try:
            link = await links.accept(
                reader,
                writer,
                address=self._office.address,
                secret=self._launch.secret,
                scope=links.scope_of(self._launch),
            )
        except links.Impostor as error:
            log.warning("%s", error)
            return
        hello = await link.receive()
        if isinstance(hello, Hello) and not self._over.is_set():
            await self._contacts.listen(link, hello)
        link.close()

    async def _hear(self, worker: int, message: Message) -> None:
        try:
            await self._listen_to(worker, message)
        except Exception as error:  # noqa: BLE001 - nobody else waits for this task
            self._fail(error)

    async def _listen_to(self, worker: int, message: Message) -> None:
        match message:
            case RanksGone():
                # So that what is said to be lost is only what no checkpoint holds.
                await self._look_for_checkpoints()
                self._feed(Said(worker, message))
            case Hello() | Leaving() | RankExited() | MemberBeat():
                if isinstance(message, MemberBeat):
                    self._recorder.heard(message)
                self._feed(Said(worker, message))
            case _:
                log.warning("worker %d sent a message that is the leader's to send", worker)

    # ---------------------------------------------------------------------------- decide, then do

    def _feed(self, given: Input) -> None:
        if self._over.is_set():
            return
        try:
            self._state, outputs = gang.step(self._state, given, steady.now())
            for output in outputs:
                self._do(output)
            self._tell_news()
            self._set_timer()
        except Exception as error:  # noqa: BLE001 - a timer would swallow it, and nothing happen
            self._fail(error)

    def _tell_news(self) -> None:
        fresh = [event for event in self._state.chronicle.events if event.seq > self._told]
        for event in fresh:
            self._recorder.announce(event)
        if fresh:
            self._told = fresh[-1].seq
            self._news.set()

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        now = steady.now()
        deadline = gang.next_deadline(self._state, now)
        if deadline is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(deadline - now + 0.001, self._feed, Tick())

    def _do(self, output: Output) -> None:
        match output:
            case Prepare():
                self._spawn(self._prepare(output))
            case StartSeat():
                self._contacts.send(output.seat.worker, _start_of(output))
            case DrainRanks(worker, generation):
                self._contacts.send(worker, Drain(generation))
            case KillRanks(worker, generation, dump):
                self._contacts.send(worker, Kill(generation, dump))
            case DismissWorker(worker, code, reason):
                self._contacts.send(worker, Dismiss(code, reason))
            case Drop(worker):
                self._contacts.drop(worker)
            case End(code, reason):
                self._spawn(self._say_goodbye(Dismiss(code, reason), self._contacts.workers))
            case Resign(reason):
                farewell = Dismiss(ExitCode.PAUSED, reason)
                self._spawn(self._say_goodbye(farewell, {self._state.me}))
            case _:
                assert_never(output)

    async def _prepare(self, order: Prepare) -> None:
        """The fence, a port and the proof that this worker still leads, all at once."""
        try:
            generation, port, _ = await asyncio.gather(
                asyncio.to_thread(raise_fence, self._storage, order.at_least),
                self._contacts.ask_port(order.worker, order.ticket, ANSWER_S),
                self._publish(),
            )
        except (StorageError, TimeoutError) as error:
            why = str(error) or f"worker {order.worker} offers no port"
            self._feed(Unprepared(order.ticket, why))
        except Deposed:
            self._abdicate()
        else:
            self._feed(Prepared(order.ticket, generation, port))

    async def _say_goodbye(self, farewell: Dismiss, workers: set[int]) -> None:
        """Publish first: a member that misses the farewell reads the outcome there."""
        deadline = steady.now() + ANSWER_S
        try:
            # Nobody announces that storage works again.
            while not await self._published() and steady.now() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(RETRY_S)
        except Deposed:
            self._abdicate()
            return
        for worker in workers:
            self._contacts.send(worker, farewell)
        await self._contacts.parted(workers, GOODBYE_S)
        self._over.set()

    # ---------------------------------------------------------------------------------- publishing

    async def _publish_always(self) -> None:
        while True:
            self._news.clear()
            try:
                await self._look_for_checkpoints()
                await self._wishes.pass_on(self._state, self._feed, self._contacts.send)
                await self._published()
            except Deposed:
                self._abdicate()
                return
            # Not wait_for: until Python 3.12 it may swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PUBLISH_EVERY_S):
                    await self._news.wait()

    async def _published(self) -> bool:
        """False when storage refuses for another reason than a new leader: training goes on."""
        try:
            await self._publish()
        except StorageError as error:
            self._complain(error)
            return False
        self._trouble = ""
        return True

    async def _publish(self) -> None:
        await self._office.publish(lambda: self._state)

    async def _look_for_checkpoints(self) -> None:
        try:
            head = await asyncio.to_thread(heads.read_head, self._storage)
        except StorageError as error:
            self._complain(error)
            return
        for entry in unseen(head, self._state):
            self._feed(Committed(entry))

    def _complain(self, error: StorageError) -> None:
        if str(error) != self._trouble:
            self._trouble = str(error)
            log.warning("%s", error)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """A leader that cannot do its work makes way for another, or for itself afresh."""
        self._failure = self._failure or error
        self._over.set()

    def _abdicate(self) -> None:
        log.warning("another leader took over; the ranks of this one end")
        self._over.set()
