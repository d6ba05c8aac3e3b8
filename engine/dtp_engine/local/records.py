"""The ledger's SQL: documents of the frozen nouns, found by a few columns. Blocking; one thread at
a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from dtp_engine.errors import LeaseLost, LedgerError
from dtp_engine.jobs import Attempt, Event, Job, Request
from dtp_engine.ledger import Change, Lease
from dtp_engine.local.database import BUSY_S, explained, open_database, transaction

_encode = msgspec.json.Encoder().encode
_JOB = msgspec.json.Decoder(Job)
_ATTEMPT = msgspec.json.Decoder(Attempt)
_REQUEST = msgspec.json.Decoder(Request)
_EVENT = msgspec.json.Decoder(Event)

T = TypeVar("T")


class Records:
    """What `LocalLedger` does, without async: see `dtp_engine.ledger.Ledger` for each method."""

    def __init__(self, path: Path | None, *, busy_s: float = BUSY_S) -> None:
        """None = in memory. Raises `LedgerError`."""
        self.path = path
        self._db = open_database(path, busy_s=busy_s)

    def close(self) -> None:
        with explained(self.path):
            self._db.close()

    # -- clients

    def request(self, request: Request, job: Job | None) -> Request:
        with explained(self.path), transaction(self._db):
            stored = self._stored_request(request.key)
            if stored is not None:
                return stored
            self._db.execute(
                "INSERT INTO requests (key, job_id, answered, body) VALUES (?, ?, ?, ?)",
                (request.key, request.job_id, _answered(request), _encode(request)),
            )
            if job is not None:
                self._insert_job(job)
            return request

    def read_request(self, key: str) -> Request | None:
        with explained(self.path):
            return self._stored_request(key)

    def pending(self) -> Sequence[Request]:
        return self._read(_REQUEST, "SELECT body FROM requests WHERE answered = 0 ORDER BY seq", ())

    # -- readers

    def jobs(self, active_only: bool) -> Sequence[Job]:  # noqa: FBT001 - bound by its one caller
        where = "WHERE active = 1" if active_only else ""
        return self._read(_JOB, f"SELECT body FROM jobs {where} ORDER BY seq", ())  # noqa: S608

    def job(self, job_id: str) -> Job | None:
        found = self._read(_JOB, "SELECT body FROM jobs WHERE id = ?", (job_id,))
        return found[0] if found else None

    def attempts(self, job_ids: Sequence[str]) -> Sequence[Attempt]:
        query = "SELECT body FROM attempts WHERE job_id = ? ORDER BY number"
        found = [a for job_id in job_ids for a in self._read(_ATTEMPT, query, (job_id,))]
        return sorted(found, key=lambda attempt: attempt.created_at)

    def events(self, after: int, job_id: str | None, limit: int) -> Sequence[Event]:
        if job_id is None:
            query = "SELECT body FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
            return self._read(_EVENT, query, (after, limit))
        query = "SELECT body FROM events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?"
        return self._read(_EVENT, query, (job_id, after, limit))

    def revision(self) -> int:
        """``data_version`` moves with the commits of others only, ``total_changes`` with our own;
        both only grow, so their sum moves with either."""
        with explained(self.path):
            others = self._db.execute("PRAGMA data_version").fetchone()[0]
            return int(others) + self._db.total_changes

    # -- the lease

    def lease(self) -> Lease | None:
        with explained(self.path):
            return self._held()

    def take_lease(self, holder: str, over: Lease | None) -> Lease | None:
        with explained(self.path), transaction(self._db):
            held = self._held()
            if (held is None) != (over is None):
                return None
            if held and over and (held.token, held.beat) != (over.token, over.beat):
                return None
            token = self._db.execute("SELECT token FROM lease").fetchone()[0] + 1
            taken = Lease(holder, token, 0, datetime.now(UTC))
            self._write_lease(taken)
            return taken

    def renew_lease(self, lease: Lease) -> Lease:
        with explained(self.path), transaction(self._db):
            self._fence(lease)
            renewed = replace(lease, beat=lease.beat + 1, at=datetime.now(UTC))
            self._write_lease(renewed)
            return renewed

    def release_lease(self, lease: Lease) -> None:
        """The token stays, so that the next holder's is greater. Not an error when it is lost."""
        with explained(self.path):
            self._db.execute(
                "UPDATE lease SET holder = '' WHERE token = ? AND holder = ?",
                (lease.token, lease.holder),
            )

    # -- the lease holder

    def commit(self, lease: Lease, change: Change) -> Job:
        with explained(self.path), transaction(self._db):
            self._fence(lease)
            stored = self._update_job(change.job)
            self._upsert_attempts(change.attempts)
            self._append(change.events)
            self._answer(change.answered)
            return stored

    # -- inside a transaction

    def _fence(self, lease: Lease) -> None:
        held = self._held()
        if held is None or held.token != lease.token:
            now = "nobody" if held is None else held.holder
            raise LeaseLost(f"{lease.holder} lost the lease of {self.path}; {now} holds it")

    def _held(self) -> Lease | None:
        row = self._db.execute("SELECT holder, token, beat, at FROM lease").fetchone()
        holder, token, beat, at = row
        return Lease(holder, token, beat, datetime.fromisoformat(at)) if holder else None

    def _write_lease(self, lease: Lease) -> None:
        self._db.execute(
            "UPDATE lease SET holder = ?, token = ?, beat = ?, at = ?",
            (lease.holder, lease.token, lease.beat, lease.at.isoformat()),
        )

    def _stored_request(self, key: str) -> Request | None:
        row = self._db.execute("SELECT body FROM requests WHERE key = ?", (key,)).fetchone()
        return None if row is None else _decode(_REQUEST, row[0])

    def _insert_job(self, job: Job) -> None:
        try:
            self._db.execute(
                "INSERT INTO jobs (id, name, state, active, version, body)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (job.id, job.name, job.state, job.active, job.version, _encode(job)),
            )
        except sqlite3.IntegrityError:
            raise LedgerError(f"there is a job {job.id} already; submit with another key") from None

    def _update_job(self, job: Job) -> Job:
        stored = replace(job, version=job.version + 1)
        changed = self._db.execute(
            "UPDATE jobs SET name = ?, state = ?, active = ?, version = ?, body = ?"
            " WHERE id = ? AND version = ?",
            (job.name, job.state, job.active, stored.version, _encode(stored), job.id, job.version),
        ).rowcount
        if changed != 1:
            raise LeaseLost(f"job {job.id} is no longer at version {job.version}")
        return stored

    def _upsert_attempts(self, attempts: Iterable[Attempt]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO attempts (job_id, number, body) VALUES (?, ?, ?)",
            [(a.job_id, a.number, _encode(a)) for a in attempts],
        )

    def _append(self, events: Sequence[Event]) -> None:
        if not events:
            return
        last = self._db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        numbered = [replace(e, seq=seq) for seq, e in enumerate(events, last + 1)]
        self._db.executemany(
            "INSERT INTO events (seq, job_id, body) VALUES (?, ?, ?)",
            [(e.seq, e.job_id, _encode(e)) for e in numbered],
        )

    def _answer(self, requests: Iterable[Request]) -> None:
        """The first answer stays."""
        self._db.executemany(
            "UPDATE requests SET answered = ?, body = ? WHERE key = ? AND answered = 0",
            [(_answered(r), _encode(r), r.key) for r in requests],
        )

    def _read(
        self, decoder: msgspec.json.Decoder[T], query: str, values: Sequence[object]
    ) -> list[T]:
        with explained(self.path):
            rows = self._db.execute(query, values).fetchall()
        return [_decode(decoder, row[0]) for row in rows]


def _answered(request: Request) -> bool:
    return request.answered_at is not None


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise LedgerError(f"the ledger holds a record that cannot be read: {error}") from error
