"""What a tracker is told, and the protocol that each of them implements."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from dtp_trainer.storage import FileStorage, open_storage
from dtp_trainer.wire import Exit, Launch

Say: TypeAlias = Callable[[str], None]
"""One line for people, in the worker's log."""


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """The job that is tracked; the first line of the process's stdin."""

    job_id: str
    job_name: str
    attempt: int
    term: int
    start: int
    """How often this leader has started the process before."""
    worker: int
    storage: str
    """URI of ``jobs/<id>/``."""
    scratch: str
    trackers: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    """The policy; its ``keep_best`` says which checkpoint is the best."""

    @property
    def token(self) -> tuple[int, int, int]:
        """Grows with each process that may track the job."""
        return self.attempt, self.term, self.start

    @property
    def folder(self) -> str | None:
        """The job's storage as a path, where it is one."""
        storage = open_storage(self.storage)
        return str(storage.root) if isinstance(storage, FileStorage) else None


def about(launch: Launch, *, term: int, start: int) -> About:
    return About(
        job_id=launch.job_id,
        job_name=launch.job_name,
        attempt=launch.attempt,
        term=term,
        start=start,
        worker=launch.worker,
        storage=launch.storage,
        scratch=launch.scratch,
        trackers=launch.trackers,
        config=launch.config,
        checkpoint=launch.checkpoint,
    )


def encode_about(told: About) -> str:
    return json.dumps(dataclasses.asdict(told))


def parse_about(line: str) -> About:
    """Raises `ValueError`, `TypeError`."""
    return About(**json.loads(line))


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Numbers of one moment, by name."""

    at: float
    """Unix time."""
    step: int
    """Completed since the job began; of a row about machines, whole seconds since then."""
    values: Mapping[str, float]


class Tracker(Protocol):
    """Calls come in the order of time. An exception ends this tracker, and is told."""

    def log(self, row: Row) -> None:
        """What the job measured at a step."""
        ...

    def log_machines(self, row: Row) -> None:
        """What the workers use."""
        ...

    def go_back(self, step: int) -> None:
        """The next rows are of steps after `step`, whatever was logged before."""
        ...

    def checkpoint(self, name: str) -> None:
        """It was committed."""
        ...

    def tick(self) -> None:
        """A few seconds have passed."""
        ...

    def close(self, ending: Exit | None) -> None:
        """The attempt ended, or (None) another process goes on."""
        ...
