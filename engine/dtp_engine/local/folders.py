"""The state folder of this machine, and what lies in the folder of one worker."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtp_engine.jobs import AttemptId
from dtp_trainer import wire


@dataclass(frozen=True, slots=True)
class Home:
    """``DTP_HOME``."""

    path: Path

    @property
    def zygotes(self) -> Path:
        return self.path / "zygotes"

    def attempt(self, attempt: AttemptId) -> Path:
        return self.path / "workers" / str(attempt)

    def worker(self, attempt: AttemptId, worker: int) -> WorkerFolder:
        return WorkerFolder(self.attempt(attempt) / f"w{worker}", worker)

    def workers(self, attempt: AttemptId) -> list[WorkerFolder]:
        """Those that were ever launched or stopped, by number."""
        return _workers_in(self.attempt(attempt))

    def all_workers(self) -> Iterator[WorkerFolder]:
        """Of every job and attempt."""
        for attempt in _names(self.path / "workers"):
            yield from _workers_in(self.path / "workers" / attempt)


@dataclass(frozen=True, slots=True)
class WorkerFolder:
    """``workers/<job>.a<attempt>/w<worker>/``; every file in it is written whole or not at all."""

    path: Path
    worker: int

    @property
    def launch(self) -> Path:
        return self.path / "launch.json"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def log(self) -> Path:
        """Standard output and error of the agent."""
        return self.path / "log"

    @property
    def claim(self) -> Path:
        return self.path / wire.CLAIM_FILE

    @property
    def exit(self) -> Path:
        return self.path / wire.EXIT_FILE

    @property
    def spawned(self) -> Path:
        """`ProcessRecord` of the process that was started to become this worker."""
        return self.path / "spawned.json"

    @property
    def reserved(self) -> Path:
        """The part of the machine that this worker has until it is gone."""
        return self.path / "reserved.json"

    @property
    def stopping(self) -> Path:
        """When it was asked to stop."""
        return self.path / "stopping.json"

    @property
    def gone(self) -> Path:
        """How it ended, once nothing of it runs any more; never changes afterwards."""
        return self.path / "gone.json"

    def create(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def take_claim(self, claim: wire.ProcessRecord) -> bool:
        """False when the worker was claimed before."""
        draft = _draft(self.claim, wire.encode_object(claim))
        try:
            os.link(draft, self.claim)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def read_record(self, path: Path) -> wire.ProcessRecord | None:
        found = read_json(path)
        if not {"pid", "start_time"} <= found.keys():
            return None
        record: wire.ProcessRecord = wire.ProcessRecord.from_dict(found)
        return record

    def rank_records(self) -> list[wire.ProcessRecord]:
        folder = self.scratch / wire.RANKS_FOLDER
        found = (self.read_record(folder / name) for name in _names(folder))
        return [record for record in found if record]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Mode 0600; a reader sees all of it or nothing."""
    _draft(path, (json.dumps(value, indent=1) + "\n").encode()).replace(path)


def write_bytes(path: Path, data: bytes) -> None:
    _draft(path, data).replace(path)


def read_json(path: Path) -> Mapping[str, Any]:
    """Empty for a file that is not there or is no JSON object. Raises `OSError` for one that
    cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _draft(path: Path, data: bytes) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft


def _workers_in(folder: Path) -> list[WorkerFolder]:
    numbers = sorted(int(n[1:]) for n in _names(folder) if n[0] == "w" and n[1:].isdigit())
    return [WorkerFolder(folder / f"w{number}", number) for number in numbers]


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(folder)  # noqa: PTH208 - names suffice
    return []
