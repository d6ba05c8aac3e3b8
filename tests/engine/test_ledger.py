"""The SQLite ledger: what it promises to clients and to the controller, with real files and real
processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dtp_engine.errors import LeaseLost, LedgerError
from dtp_engine.jobs import (
    Attempt,
    CheckpointPolicy,
    Event,
    Intent,
    Job,
    JobSpec,
    JobState,
    NodeRange,
    Placement,
    PlacementState,
    Reason,
    Request,
    RequestKind,
    Resources,
)
from dtp_engine.ledger import Change, Lease
from dtp_engine.local import database
from dtp_engine.local.database import VERSION
from dtp_engine.local.ledger import LocalLedger

NOW = datetime(2026, 11, 23, 8, 30, 1, 123456, tzinfo=UTC)

SPEC = JobSpec(
    name="digits",
    run="python train.py",
    nodes=NodeRange(1, 4),
    resources=Resources(gpus=1, cpus=1.5, memory_bytes=2**33),
    args={"epochs": "3"},
    env={"A": "ü"},
    secrets=("TOKEN",),
    checkpoint=CheckpointPolicy(every=timedelta(seconds=30), keep_best="accuracy"),
    max_duration=timedelta(days=2, microseconds=5),
)


def job_of(job_id: str) -> Job:
    return Job(job_id, "digits", SPEC, JobState.QUEUED, Intent.RUN, 2, NOW, "ana@laptop")


def submit_of(job_id: str, key: str | None = None) -> Request:
    return Request(key or f"key-{job_id}", RequestKind.SUBMIT, job_id, "ana@laptop", NOW)


def event_of(job_id: str, name: str = "state") -> Event:
    return Event(0, NOW, job_id, 1, "controller", name, "QUEUED → STARTING")


async def submitted(ledger: LocalLedger, job_id: str) -> Job:
    job = job_of(job_id)
    await ledger.request(submit_of(job_id), job=job)
    return job


async def leased(ledger: LocalLedger) -> Lease:
    lease = await ledger.take_lease("host:1:2", over=None)
    assert lease is not None
    return lease


@pytest.fixture(params=["file", "memory"])
async def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LocalLedger]:
    opened = await LocalLedger.open(
        tmp_path / "ledger.db" if request.param == "file" else ":memory:"
    )
    yield opened
    await opened.aclose()


async def test_job_comes_back_as_it_was_submitted(ledger: LocalLedger) -> None:
    """Every field of a job, nested and odd ones included, survives the ledger."""
    job = replace(
        job_of("abc"), reason=Reason.RETRYING, retry_at=NOW, last_failures=("E @ 1", "E @ 2")
    )
    await ledger.request(submit_of("abc"), job=job)
    assert await ledger.job("abc") == job
    assert await ledger.job("abd") is None


async def test_same_key_is_one_request(ledger: LocalLedger) -> None:
    """A second request with the same key changes nothing and returns the first."""
    await submitted(ledger, "abc")
    again = await ledger.request(submit_of("xyz", key="key-abc"), job=job_of("xyz"))
    assert again == submit_of("abc")
    assert [job.id for job in await ledger.jobs()] == ["abc"]
    assert await ledger.read_request("key-abc") == submit_of("abc")
    assert await ledger.read_request("key-xyz") is None


async def test_job_id_is_taken_once(ledger: LocalLedger) -> None:
    """Another key with an id that exists is refused, and its request is not recorded."""
    await submitted(ledger, "abc")
    with pytest.raises(LedgerError, match="job abc already"):
        await ledger.request(submit_of("abc", key="other"), job=job_of("abc"))
    assert await ledger.read_request("other") is None


async def test_active_jobs_are_those_with_something_to_do(ledger: LocalLedger) -> None:
    """`active_only` leaves out final and paused jobs and keeps the order of submission."""
    lease = await leased(ledger)
    for job_id, state in (("c", JobState.PAUSED), ("b", JobState.RUNNING), ("a", JobState.QUEUED)):
        job = await submitted(ledger, job_id)
        await ledger.commit(lease, Change(replace(job, state=state)))
    assert [job.id for job in await ledger.jobs()] == ["c", "b", "a"]
    assert [job.id for job in await ledger.jobs(active_only=True)] == ["b", "a"]


async def test_commit_writes_job_attempts_events_and_answers(ledger: LocalLedger) -> None:
    """One commit stores all it carries, with the job's version one higher and events numbered."""
    job = await submitted(ledger, "abc")
    lease = await leased(ledger)
    placed = (Placement(0, PlacementState.PLANNED, NOW),)
    attempt = Attempt("abc", 1, NOW, "secret", placed)
    answered = replace(submit_of("abc"), answered_at=NOW)
    events = (event_of("abc"), event_of("abc", "launch"))
    change = Change(replace(job, attempt=1), (attempt,), events, (answered,))
    stored = await ledger.commit(lease, change)
    assert stored == replace(job, attempt=1, version=1) == await ledger.job("abc")
    assert await ledger.attempts(["abc"]) == [attempt]
    assert await ledger.pending() == []
    assert await ledger.read_request("key-abc") == answered
    assert [(e.seq, e.name) for e in await ledger.events()] == [(1, "state"), (2, "launch")]


async def test_attempt_is_replaced_by_its_number(ledger: LocalLedger) -> None:
    """A commit of the same attempt replaces it; attempts come oldest first."""
    job = await submitted(ledger, "abc")
    lease = await leased(ledger)
    first, second = Attempt("abc", 1, NOW, "s"), Attempt("abc", 2, NOW, "s")
    job = await ledger.commit(lease, Change(job, (second, first)))
    ended = replace(first, outcome="paused")
    await ledger.commit(lease, Change(job, (ended,)))
    assert await ledger.attempts(["abc", "nobody"]) == [ended, second]


async def test_pending_requests_come_oldest_first(ledger: LocalLedger) -> None:
    """Requests are answered in the order in which they were written."""
    await submitted(ledger, "b")
    await ledger.request(Request("k", RequestKind.PAUSE, "b", "bo", NOW))
    await submitted(ledger, "a")
    assert [r.key for r in await ledger.pending()] == ["key-b", "k", "key-a"]


async def test_first_answer_stays(ledger: LocalLedger) -> None:
    """A request that was answered keeps its answer."""
    job = await submitted(ledger, "abc")
    lease = await leased(ledger)
    yes = replace(submit_of("abc"), answered_at=NOW)
    job = await ledger.commit(lease, Change(job, answered=(yes,)))
    await ledger.commit(lease, Change(job, answered=(replace(yes, refusal="no"),)))
    assert await ledger.read_request("key-abc") == yes


async def test_events_are_read_on_from_a_number(ledger: LocalLedger) -> None:
    """`after`, `job_id` and `limit` select events without gaps or repetitions."""
    lease = await leased(ledger)
    jobs = [await submitted(ledger, job_id) for job_id in ("a", "b")]
    for job in jobs:
        await ledger.commit(lease, Change(job, events=(event_of(job.id), event_of(job.id))))
    assert [e.seq for e in await ledger.events(after=1)] == [2, 3, 4]
    assert [e.seq for e in await ledger.events(after=1, limit=2)] == [2, 3]
    assert [e.seq for e in await ledger.events(job_id="b")] == [3, 4]


async def test_stale_version_is_refused_whole(ledger: LocalLedger) -> None:
    """A commit that read an older job is refused, and none of its events remains."""
    job = await submitted(ledger, "abc")
    lease = await leased(ledger)
    await ledger.commit(lease, Change(job))
    with pytest.raises(LeaseLost, match="no longer at version 0"):
        await ledger.commit(lease, Change(job, (Attempt("abc", 1, NOW, "s"),), (event_of("abc"),)))
    assert await ledger.events() == []
    assert await ledger.attempts(["abc"]) == []


async def test_lease_has_one_holder(ledger: LocalLedger) -> None:
    """A held lease is not free, and only its last seen state can be taken over."""
    lease = await leased(ledger)
    assert await ledger.take_lease("other", over=None) is None
    renewed = await ledger.renew_lease(lease)
    assert renewed.beat == lease.beat + 1
    assert await ledger.take_lease("other", over=lease) is None
    taken = await ledger.take_lease("other", over=renewed)
    assert taken is not None
    assert taken.token == lease.token + 1
    assert await ledger.lease() == taken


async def test_deposed_holder_can_do_nothing(ledger: LocalLedger) -> None:
    """After a take-over the old token neither commits, renews nor releases."""
    job = await submitted(ledger, "abc")
    lease = await leased(ledger)
    taken = await ledger.take_lease("other", over=lease)
    with pytest.raises(LeaseLost):
        await ledger.commit(lease, Change(job))
    with pytest.raises(LeaseLost):
        await ledger.renew_lease(lease)
    await ledger.release_lease(lease)
    assert await ledger.lease() == taken


async def test_released_lease_is_free_and_its_token_is_spent(ledger: LocalLedger) -> None:
    """Release frees the lease; the next token is greater and the old one is refused."""
    job = await submitted(ledger, "abc")
    lease = await leased(ledger)
    await ledger.release_lease(lease)
    assert await ledger.lease() is None
    with pytest.raises(LeaseLost):
        await ledger.commit(lease, Change(job))
    assert (await leased(ledger)).token > lease.token


async def test_revision_moves_with_own_writes_only_when_there_are_any(ledger: LocalLedger) -> None:
    """Reading leaves the revision; every write moves it up."""
    before = await ledger.revision()
    await ledger.jobs()
    await ledger.lease()
    assert await ledger.revision() == before
    await submitted(ledger, "abc")
    assert await ledger.revision() > before


async def test_revision_moves_with_writes_of_others(tmp_path: Path) -> None:
    """A write through another connection moves the revision."""
    mine, other = [await LocalLedger.open(tmp_path / "l.db") for _ in range(2)]
    before = await mine.revision()
    await submitted(other, "abc")
    assert await mine.revision() > before
    await mine.aclose()
    await other.aclose()


async def test_ledger_is_private(tmp_path: Path) -> None:
    """Nobody else can read the ledger, its side files or the folder made for it."""
    ledger = await LocalLedger.open(tmp_path / "home" / "ledger.db")
    await submitted(ledger, "abc")
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "home").iterdir()}
    assert set(modes) == {"ledger.db", "ledger.db-wal", "ledger.db-shm"}
    assert set(modes.values()) == {0o600}
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    await ledger.aclose()


# ---------------------------------------------------------------------------- things go wrong


def user_version(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as reader:
        return int(reader.execute("PRAGMA user_version").fetchone()[0])


async def test_newer_ledger_is_left_untouched(tmp_path: Path) -> None:
    """A ledger of a newer version is refused in one line; its bytes stay, a log not yet folded
    in included."""
    path = tmp_path / "ledger.db"
    await (await LocalLedger.open(path)).aclose()
    newer = sqlite3.connect(path, isolation_level=None)
    newer.execute(f"PRAGMA user_version = {VERSION + 7}")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if not p.name.endswith("shm")}
    with pytest.raises(LedgerError, match=rf"newer dtp \(version {VERSION + 7}") as raised:
        await LocalLedger.open(path)
    assert "\n" not in str(raised.value)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if not p.name.endswith("shm")}
    assert after == before
    newer.close()


async def test_older_ledger_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger of an older version takes each missing step, in order, and keeps its jobs."""
    path = tmp_path / "ledger.db"
    older = await LocalLedger.open(path)
    await submitted(older, "abc")
    await older.aclose()
    steps = ("ALTER TABLE jobs ADD COLUMN one", "ALTER TABLE jobs RENAME COLUMN one TO two;")
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, *steps))
    monkeypatch.setattr(database, "VERSION", VERSION + 2)
    ledger = await LocalLedger.open(path)
    assert [job.id for job in await ledger.jobs()] == ["abc"]
    await ledger.aclose()
    assert user_version(path) == VERSION + 2


async def test_failed_migration_leaves_the_older_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one step fails none is taken."""
    path = tmp_path / "ledger.db"
    await (await LocalLedger.open(path)).aclose()
    steps = ("ALTER TABLE jobs ADD COLUMN one", "ALTER TABLE absent ADD COLUMN two")
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, *steps))
    monkeypatch.setattr(database, "VERSION", VERSION + 2)
    with pytest.raises(LedgerError, match="no such table: absent"):
        await LocalLedger.open(path)
    assert user_version(path) == VERSION


async def test_foreign_sqlite_file_is_refused(tmp_path: Path) -> None:
    """A SQLite file of somebody else is not turned into a ledger."""
    path = tmp_path / "ledger.db"
    with sqlite3.connect(path) as foreign:
        foreign.execute("CREATE TABLE theirs (a)")
    foreign.close()
    with pytest.raises(LedgerError, match="not a ledger of dtp"):
        await LocalLedger.open(path)


async def test_damaged_ledger_is_named(tmp_path: Path) -> None:
    """A file that is no database is an error in words, with what to do."""
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(LedgerError, match=r"damaged .* move it aside"):
        await LocalLedger.open(path)


async def test_damage_found_later_is_named(tmp_path: Path) -> None:
    """A page that was overwritten is an error in words when it is read."""
    path = tmp_path / "ledger.db"
    ledger = await LocalLedger.open(path)
    await submitted(ledger, "abc")
    await ledger.aclose()
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    path.write_bytes(raw)
    ledger = await LocalLedger.open(path)
    with pytest.raises(LedgerError, match="damaged"):
        await ledger.jobs()
    await ledger.aclose()


async def test_locked_ledger_is_an_error_after_the_wait(tmp_path: Path) -> None:
    """While another process keeps the lock a write gives up in words, a read works, and the next
    write after the lock works."""
    path = tmp_path / "ledger.db"
    ledger = await LocalLedger.open(path, busy_s=0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="still locked by another process"):
        await submitted(ledger, "abc")
    assert await ledger.jobs() == []
    other.close()
    await submitted(ledger, "abc")
    await ledger.aclose()


async def test_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    """A state folder in which nothing can be created says so, with the way out."""
    folder = Path("/proc") if os.geteuid() == 0 else tmp_path  # root may write anywhere else
    if folder is tmp_path:
        folder.chmod(0o555)
    with pytest.raises(LedgerError, match="set DTP_HOME"):
        await LocalLedger.open(folder / "ledger.db")


async def test_full_disk_loses_only_the_write_that_met_it(tmp_path: Path) -> None:
    """A write that finds no space is refused in words and leaves nothing; the ledger stays
    readable and goes on when there is space again."""
    ledger = await LocalLedger.open(tmp_path / "ledger.db")
    await submitted(ledger, "abc")
    connection = ledger._records._db
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    large = replace(job_of("big"), detail="x" * 100_000)
    with pytest.raises(LedgerError, match="no space left"):
        await ledger.request(submit_of("big"), job=large)
    assert [job.id for job in await ledger.jobs()] == ["abc"]
    assert await ledger.read_request("key-big") is None
    connection.execute("PRAGMA max_page_count = 100000")
    await ledger.request(submit_of("big"), job=large)
    await ledger.aclose()


async def test_cancelled_call_leaves_the_ledger_usable(tmp_path: Path) -> None:
    """A caller that goes away does not disturb the calls after it."""
    ledger = await LocalLedger.open(tmp_path / "ledger.db")
    for number in range(20):
        call = asyncio.create_task(submitted(ledger, f"job{number}"))
        await asyncio.sleep(0)
        call.cancel()
    assert len(await ledger.jobs()) == len(await ledger.pending())
    await ledger.aclose()
