"""A SQLite file opened safely: private, write-ahead log, schema brought up to date, errors in
words."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from dtp_engine.errors import LedgerError

BUSY_S = 5.0
"""How long a call waits for another process's transaction."""

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, state TEXT NOT NULL,
        active INTEGER NOT NULL, version INTEGER NOT NULL, body BLOB NOT NULL
    );
    CREATE INDEX jobs_name ON jobs (name);
    CREATE INDEX jobs_active ON jobs (seq) WHERE active = 1;
    CREATE TABLE attempts (
        job_id TEXT NOT NULL, number INTEGER NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (job_id, number)
    ) WITHOUT ROWID;
    CREATE TABLE requests (
        seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL,
        answered INTEGER NOT NULL, body BLOB NOT NULL
    );
    CREATE INDEX requests_pending ON requests (seq) WHERE answered = 0;
    CREATE TABLE events (seq INTEGER PRIMARY KEY, job_id TEXT NOT NULL, body BLOB NOT NULL);
    CREATE INDEX events_job ON events (job_id, seq);
    CREATE TABLE lease (
        one INTEGER PRIMARY KEY CHECK (one = 1), holder TEXT NOT NULL, token INTEGER NOT NULL,
        beat INTEGER NOT NULL, at TEXT NOT NULL
    );
    INSERT INTO lease VALUES (1, '', 0, 0, '1970-01-01T00:00:00+00:00');
    """,
)
"""Script n brings a ledger of version n to version n + 1. Only ever appended to."""

VERSION = len(MIGRATIONS)


def open_database(path: Path | None, *, busy_s: float = BUSY_S) -> sqlite3.Connection:
    """A connection for one thread at a time; None = in memory. Raises `LedgerError`.

    ``synchronous=NORMAL``: a commit is in the operating system's hands when it is acknowledged, so
    it survives the death of every process; only a power cut may take back the newest commits
    (never part of one), and a power cut ends every worker of this machine as well. `FULL` would
    add a disk flush to each commit and protect nothing that is still running.
    """
    with explained(path):
        if path is not None:
            _make_private(path)
            _refuse_newer(path, busy_s)
        connection = _connect(path or ":memory:", busy_s)
        try:
            _prepare(connection, path, busy_s)
        except BaseException:
            connection.close()
            raise
        return connection


@contextlib.contextmanager
def explained(path: Path | None) -> Iterator[None]:
    """SQLite's errors as `LedgerError`: one line that says what, which file and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerError(_words(error, path)) from error
    except OSError as error:
        raise LedgerError(
            f"cannot use the ledger {path}: {error.strerror or error}; "
            "make its folder writable or set DTP_HOME to another"
        ) from error


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing. IMMEDIATE: the lock is taken before the first read, so that what was checked
    still holds when it is written."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _connect(target: Path | str, busy_s: float, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(
        target, timeout=busy_s, isolation_level=None, check_same_thread=False, uri=uri
    )


def _make_private(path: Path) -> None:
    """Secrets of attempts are in the ledger. SQLite gives its side files the mode of the file."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _refuse_newer(path: Path, busy_s: float) -> None:
    """Looked at by a read-only connection: closing one never folds the write-ahead log into the
    file, so that a ledger of a newer version is left byte for byte as it was."""
    address = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(_connect(address, busy_s, uri=True)) as reader:
        version = _version(reader)
        tables = reader.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version > VERSION:
        raise LedgerError(
            f"the ledger {path} was written by a newer dtp (version {version}, this one knows "
            f"{VERSION}); upgrade dtp-tui or set DTP_HOME to another folder"
        )
    if version == 0 and tables:
        raise LedgerError(f"{path} is a SQLite file but not a ledger of dtp; set DTP_HOME")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _prepare(connection: sqlite3.Connection, path: Path | None, busy_s: float) -> None:
    if path is not None:
        _use_wal(connection, path, busy_s)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 16777216")
    if _version(connection) < VERSION:
        _migrate(connection)


def _use_wal(connection: sqlite3.Connection, path: Path, busy_s: float) -> None:
    """SQLite does not wait for its busy timeout when two connections change the mode at once."""
    deadline = time.monotonic() + busy_s
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise LedgerError(
                f"the ledger {path} cannot keep a write-ahead log here (a network file system?); "
                "set DTP_HOME to a folder on a local disk"
            )
        return


def _migrate(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        for version in range(_version(connection), VERSION):
            for statement in MIGRATIONS[version].split(";"):  # executescript would commit first
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")


def _code(error: sqlite3.Error) -> int:
    """The primary result code; 0 when Python raised it without asking SQLite."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _words(error: sqlite3.Error, path: Path | None) -> str:
    match _code(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return f"the ledger {path} is still locked by another process; try again"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:
            return (
                f"the ledger {path} cannot be written; "
                "make it and its folder writable or set DTP_HOME to another"
            )
        case sqlite3.SQLITE_FULL:
            return f"no space left for the ledger {path}; free some space and try again"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return (
                f"the ledger {path} is damaged ({error}); move it aside to start with an empty "
                "one: checkpoints in storage are not touched"
            )
        case _:
            return f"the ledger {path} failed: {error}"
