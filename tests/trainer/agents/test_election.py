"""One leader a term, one owner a generation, and proof of membership on every connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dtp_trainer.gang import election, links
from dtp_trainer.gang.chronicle import KEPT, Chronicle, continued
from dtp_trainer.gang.election import Led, Over, Sight, Vacant
from dtp_trainer.gang.links import Link
from dtp_trainer.gang.messages import Beat, Pulse
from dtp_trainer.gang.office import Deposed, Office, raise_fence
from dtp_trainer.gang.report import inherit, report, rules_of
from dtp_trainer.gang.state import State
from dtp_trainer.storage import Conflict, Storage, open_storage
from dtp_trainer.wire import (
    GANG_KEY,
    CheckpointEntry,
    Gang,
    GangPhase,
    Host,
    Launch,
    Member,
    Window,
)
from dtp_trainer.worker import steady


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage((tmp_path / "jobs").as_uri())


def launch(worker: int = 0, attempt: int = 1) -> Launch:
    return Launch(
        job_id="abc",
        job_name="job",
        attempt=attempt,
        worker=worker,
        storage="",
        secret="s",
        workdir="",
        scratch="",
        command=("true",),
        setup=None,
        env={},
        nproc_per_node=1,
        workers=2,
        min_workers=1,
        max_workers=2,
        host="127.0.0.1",
        grace_s=1.0,
        error_budget=1,
        hang_budget=1,
        start_within_s=1.0,
        no_step_for_s=None,
        train_until=None,
        checkpoint={},
        data={},
        zygotes="",
        zygote_idle_s=1.0,
    )


def state_of(previous: Gang | None = None, *, worker: int = 0, attempt: int = 1) -> State:
    return inherit(previous, launch(worker, attempt), steady.now())


# ---------------------------------------------------------------------------------------- election


def test_one_leader_a_term(storage: Storage) -> None:
    """Of many workers that campaign at once, one is elected."""
    sight = election.look(storage)

    def campaign(worker: int) -> bool:
        try:
            election.take_office(storage, sight, attempt=1, worker=worker, address=f"h:{worker}")
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(campaign, range(8))) == 1


def test_one_owner_a_generation(storage: Storage) -> None:
    """Leaders that raise the fence at once get different generations."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: raise_fence(storage, 5), range(16)))
    assert sorted(found) == [*range(5, 21)]


def test_verdicts() -> None:
    """What ``gang.json`` means depends on whose attempt it is of."""
    gang = Gang(2, 1, 0, "h:1", GangPhase.RUNNING, 7, 0.0)
    ended = replace(gang, phase=GangPhase.ENDED, outcome=3, detail="rank 1 failed")
    assert election.judge(None, 2) == Vacant()
    assert election.judge(gang, 3) == Vacant()
    assert election.judge(gang, 2) == Led("h:1")
    assert election.judge(gang, 1) == Over(78, "attempt 2 replaced attempt 1")
    assert election.judge(ended, 2) == Over(3, "rank 1 failed")
    assert election.judge(ended, 3) == Vacant()


def test_damaged_object_is_replaced(storage: Storage) -> None:
    """A ``gang.json`` that nobody can read does not keep a gang from forming."""
    storage.write(GANG_KEY, b"{half")
    sight = election.look(storage)
    assert sight.gang is None
    mandate = election.take_office(storage, sight, attempt=1, worker=0, address="h:1")
    assert mandate.term == 1


async def test_deposed_leader_cannot_publish(storage: Storage) -> None:
    """After another took office, what the old leader writes is refused."""
    first = election.take_office(storage, Sight(None, None), attempt=1, worker=0, address="h:1")
    office, state = Office(storage, first), state_of()
    await office.publish(lambda: state)
    election.take_office(storage, election.look(storage), attempt=1, worker=1, address="h:2")
    with pytest.raises(Deposed):
        await office.publish(lambda: state)
    gang = election.look(storage).gang
    assert gang is not None
    assert (gang.leader, gang.term) == (1, 2)


async def test_lost_answer_is_no_deposition(storage: Storage) -> None:
    """A write that happened although its answer was lost does not depose its own writer."""
    mandate = election.take_office(storage, Sight(None, None), attempt=1, worker=0, address="h:1")
    stale, office = Office(storage, mandate), Office(storage, mandate)
    state = state_of()
    await stale.publish(lambda: state)
    await office.publish(lambda: state)


# -------------------------------------------------------------------------------------- succession


def test_numbers_go_on_within_an_attempt() -> None:
    """A new leader goes on with events, generation and budgets, and expects the others."""
    old = state_of()
    members = report(old, attempt=1, term=1, address="h:1", now=time.time())
    gang = replace(
        members,
        leader=1,
        generation=7,
        world_size=3,
        errors_used=2,
        restarts=4,
        phase=GangPhase.RUNNING,
        members=tuple(member(worker) for worker in (0, 1, 2)),
    )
    new = state_of(gang, worker=0)
    assert (new.generation, new.errors_used, new.restarts) == (7, 2, 5)
    assert new.expected == {0, 2}
    names = [event.name for event in new.chronicle.events]
    assert names == ["leader_elected", "worker_lost", "leader_elected"]
    assert [event.seq for event in new.chronicle.events] == [1, 2, 3]


def test_new_attempt_begins_its_budgets() -> None:
    """Another attempt goes on with events, generation and step, not with members and budgets."""
    gang = Gang(1, 5, 0, "h:1", GangPhase.ENDED, 7, 0.0, step=12, world_size=2, errors_used=3)
    new = state_of(gang, attempt=2)
    assert (new.generation, new.errors_used, new.expected) == (7, 0, frozenset())
    assert not new.formed
    assert new.progress.step == 12


def test_chronicle_tells_a_checkpoint_once() -> None:
    """A checkpoint is told once, also by a leader that reads of it in an older one's events."""
    entry = CheckpointEntry("step-000012.g0001", 12, 1, 1, 1, 5.0, 2_000_000)
    told = Chronicle().committed(entry)
    assert told.events[-1].text == "checkpoint step-000012.g0001, 1.9 MiB"
    gang = Gang(1, 1, 0, "h:1", GangPhase.RUNNING, 1, 0.0, events=told.events)
    seen = replace(continued(gang), generation=1)
    assert told.committed(entry) == told
    assert seen.checkpoint[1] == 12


def test_chronicle_is_bounded() -> None:
    """The newest events are kept; numbers go on."""
    chronicle = Chronicle()
    for number in range(KEPT + 50):
        chronicle = chronicle.tell(float(number), "x", "text")
    assert len(chronicle.events) == KEPT
    assert chronicle.seq == KEPT + 50


def member(worker: int) -> Member:
    return Member(worker, "127.0.0.1", 1, None, leaving=False)


# ------------------------------------------------------------------------------------------- links


@asynccontextmanager
async def door() -> AsyncIterator[tuple[str, asyncio.Queue[Link]]]:
    """A leader's side that accepts who knows the secret of attempt 1."""
    accepted: asyncio.Queue[Link] = asyncio.Queue()
    address = ""

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            accepted.put_nowait(
                await links.accept(reader, writer, address=address, secret="s", scope="abc.a1")
            )
        except links.Impostor:
            writer.close()

    server = await asyncio.start_server(visit, "127.0.0.1", 0, limit=links.LONGEST_LINE)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield address, accepted
    finally:
        server.close()


async def test_link_carries_messages() -> None:
    """Both sides prove themselves, then talk; numbers that are none survive."""
    window = Window(1.0, 1, 0, 0, 1, 3, 3, 0.0, None, {"loss": float("nan")}, None, None, {})
    host = Host(1.0, 0, 50.0, 10, 100, gpu_percent=(3.0,))
    async with door() as (address, accepted):
        link = await links.connect(address, secret="s", scope="abc.a1")
        link.send(Beat(1, {"0": 3}, reporting=True, window=window, host=host))
        theirs = await accepted.get()
        heard = await theirs.receive()
        assert isinstance(heard, Beat)
        assert heard.window is not None
        assert heard.window.values["loss"] != heard.window.values["loss"]
        assert heard.host == host
        theirs.send(Pulse())
        assert await link.receive() == Pulse()
        theirs.close()
        assert await link.receive() is None
        link.close()


class Between:
    """Passes what a member and its leader tell each other, through `change` on the leader's way."""

    def __init__(self, address: str, change: Callable[[list[bytes]], list[bytes]]) -> None:
        self._address, self._change = address, change
        self.over = asyncio.Event()

    async def visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._address.rpartition(":")
        theirs, ours = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(OSError):
            await asyncio.gather(
                self._pass_on(theirs, writer, lambda lines: lines[-1:]),
                self._pass_on(reader, ours, self._change),
            )
        self.over.set()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        change: Callable[[list[bytes]], list[bytes]],
    ) -> None:
        seen: list[bytes] = []
        while line := await reader.readline():
            seen.append(line)
            writer.writelines(change(seen))
        writer.close()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda lines: [*lines[-1:], b'{"kind":"Leaving"}\n'][: len(lines)], id="put in"
        ),
        pytest.param(lambda lines: lines[-1:] * (2 if len(lines) == 2 else 1), id="repeated"),
        pytest.param(lambda lines: lines[-1:] if len(lines) != 2 else [], id="left out"),
        pytest.param(lambda lines: [lines[-1].replace(b"1", b"2", len(lines) - 1)], id="changed"),
    ],
)
async def test_nobody_speaks_in_between(change: Callable[[list[bytes]], list[bytes]]) -> None:
    """A line that is put in, repeated, left out or changed after the proofs ends the connection:
    what was not said is never heard."""
    said = [Beat(generation=11, steps={"0": step}) for step in (1, 11, 111)]
    async with door() as (address, accepted):
        between = Between(address, change)
        server = await asyncio.start_server(between.visit, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(host, port)
        seals = await links._introduce(reader, writer, "s", f"abc.a1 {address}")
        member, leader = Link(reader, writer, seals), await accepted.get()
        for message in said:
            member.send(message)
        heard = []
        while (message := await leader.receive()) is not None:
            heard.append(message)
        assert heard == said[: len(heard)]
        assert len(heard) < len(said)
        leader.abort()
        member.abort()
        await between.over.wait()
        server.close()


@pytest.mark.parametrize(("secret", "scope"), [("guess", "abc.a1"), ("s", "abc.a2")])
async def test_stranger_is_refused(secret: str, scope: str) -> None:
    """Who knows another secret, or is of another attempt, gets no connection."""
    async with door() as (address, accepted):
        with pytest.raises(links.Refused, match="wrong secret"):
            await links.connect(address, secret=secret, scope=scope)
        assert accepted.empty()


async def test_secret_is_never_sent() -> None:
    """A listener that only records learns nothing that lets it in."""
    heard: list[bytes] = []

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps({"nonce": "00"}).encode() + b"\n")
        heard.append(await reader.readline())
        writer.write(json.dumps({"proof": json.loads(heard[0])["proof"]}).encode() + b"\n")
        writer.close()

    server = await asyncio.start_server(visit, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(links.Impostor):
        await links.connect(address, secret="top secret", scope="abc.a1")
    assert b"top secret" not in heard[0]
    server.close()


async def test_nobody_there() -> None:
    """A closed port says that the leader is gone; noise says only that it is not the leader."""
    server = await asyncio.start_server(lambda _, w: w.close(), "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(links.Unreachable, match="does not answer"):
        await links.connect(address, secret="s", scope="abc.a1")
    server.close()
    await server.wait_closed()
    with pytest.raises(links.Vacated):
        await links.connect(address, secret="s", scope="abc.a1")


def test_rules_come_from_the_launch() -> None:
    """The leader's rules are those of its own launch file."""
    rules = rules_of(launch())
    assert (rules.min_workers, rules.max_workers, rules.error_budget) == (1, 2, 1)
