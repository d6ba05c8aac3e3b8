"""The history of metrics in storage, and the logs read from where it ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from dtp_engine.backend import Since
from dtp_engine.local.folders import WorkerFolder
from dtp_engine.local.logs import Feed, beginning
from dtp_engine.series import MetricHistory
from dtp_trainer import wire
from dtp_trainer.history import FOLDER, HistoryWriter, Past, read
from dtp_trainer.storage import FileStorage

BEGAN = 1_800_000_000.0
STEP_S = 15.0


class Quick(FileStorage):
    """A disk that does not make writers wait, and counts what is read."""

    objects = 0
    bytes = 0

    def read(self, key: str) -> bytes:
        data = super().read(key)
        self.objects += 1
        self.bytes += len(data)
        return data

    def write(self, key: str, data: bytes) -> None:
        path = Path(self.root, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def window(number: int, worker: int = 0, **values: float) -> wire.Window:
    at = BEGAN + number * STEP_S
    found = {"loss": 3.0 / (1 + number / 1000), "lr": 1e-3, **values}
    phases = {"step": {"min": 0.1, "median": 0.11, "max": 0.2}}
    return wire.Window(
        at, 1, worker, worker, 2, number * 10, 10, number / 100, None, found, 100.0, None, phases
    )


def host(number: int, worker: int = 0) -> wire.Host:
    used = 50.0 + 40 * math.sin(number / 50)
    return wire.Host(BEGAN + number * STEP_S + 0.1, worker, used, 1 << 30, 4 << 30)


def days(count: float) -> Iterator[wire.Window | wire.Host]:
    """What the leader of two workers hears in so many days."""
    for number in range(int(count * 86_400 / STEP_S)):
        yield window(number, loss=99.0) if number == 1234 else window(number)
        yield from (host(number, worker) for worker in (0, 1))


def written(storage: FileStorage, records: Iterator[wire.Record]) -> HistoryWriter:
    writer = HistoryWriter(storage, attempt=1, term=1)
    batch: list[wire.Record] = []
    for record in records:
        batch.append(record)
        if record.at - batch[0].at > 295:
            writer.write(batch)
            batch = []
    writer.write(batch)
    return writer


def known(past: Past) -> MetricHistory:
    history = MetricHistory()
    for told in past.told:
        history.add(told.attempt, told.record)
    return history


@pytest.mark.slow
def test_three_days_are_opened_from_a_few_objects(tmp_path: Path) -> None:
    """Of a job that ran for three days little is read: some dozens of objects, a fraction of the
    log; the spike on the first day and the whole last hour are there."""
    storage = Quick(tmp_path / "job")
    folder = WorkerFolder(tmp_path / "w0", 0)
    folder.path.mkdir()
    with folder.log.open("w") as log:
        written(storage, _logged(days(3), log))
    storage.bytes = storage.objects = 0
    past = read(storage)
    size = folder.log.stat().st_size
    assert past.since is not None
    start = beginning(folder.log, Since(past.since, context_bytes=1 << 18))
    assert storage.objects < 70
    assert storage.bytes < size / 8
    assert size - start < 1 << 20

    history = known(past)
    loss = [*history.series("loss").points()]
    assert max(point.value for point in loss) == 99.0
    newest = BEGAN + 3 * 86_400
    assert len([point for point in loss if point.at > newest - 3600]) >= 3600 / STEP_S - 1
    assert loss[0].step <= 10
    assert len(history.series("cpu_percent", 1)) > 500


def _logged(records: Iterator[wire.Record], log: IO[str]) -> Iterator[wire.Record]:
    for record in records:
        log.write(wire.encode(record) + "\n")
        yield record


def test_history_and_log_overlap_without_duplicates(tmp_path: Path) -> None:
    """What the log holds beyond the history is added once, and nothing twice."""
    storage = FileStorage(tmp_path / "job")
    folder = WorkerFolder(tmp_path / "w0", 0)
    folder.path.mkdir()
    records = [window(number) for number in range(500)]
    folder.log.write_text("".join(wire.encode(record) + "\n" for record in records))
    written(storage, iter(records[:350]))
    past = read(storage)
    history = known(past)
    assert past.since is not None
    for line in Feed(lambda: [folder], since=Since(past.since)).read(10_000):
        assert line.record is not None
        if not past.holds(line.record):
            history.add(1, line.record)
    steps = [point.step for point in history.series("loss").points()]
    assert steps == [record.step for record in records]


def test_a_log_is_begun_where_its_time_says(tmp_path: Path) -> None:
    """Of a long log the lines before `since` are skipped, none of the later ones."""
    log = tmp_path / "log"
    lines = [wire.encode(window(number)) for number in range(5000)]
    log.write_text("\n".join([*lines, ""]))
    for number in (0, 1, 2500, 4999):
        start = beginning(log, Since(BEGAN + number * STEP_S))
        rest = log.read_text()[start:].splitlines()
        assert rest[0] in lines[: number + 1]
        assert len(rest) < 5000 - number + 1000
    assert beginning(tmp_path / "none", Since(0.0)) == 0


def test_garbage_is_passed_over(tmp_path: Path) -> None:
    """A chunk that a dying writer or a bad disk left is ignored, the others are read."""
    storage = FileStorage(tmp_path)
    writer = written(storage, iter([window(number) for number in range(200)]))
    names = sorted(entry.key for entry in storage.list(f"{FOLDER}/"))
    whole = storage.read(names[0])
    storage.write(names[0], whole[: len(whole) // 2])
    storage.write(f"{FOLDER}/0-garbage.jsonl.gz", b"no gzip")
    storage.write(f"{FOLDER}/notes.txt", b"of somebody else")
    steps = {
        told.record.step for told in read(storage).told if isinstance(told.record, wire.Window)
    }
    assert 1990 in steps
    assert 0 not in steps
    writer.write([window(200)])
    assert any(one.record.at == BEGAN + 200 * STEP_S for one in read(storage).told)


def test_a_merge_that_was_cut_off_counts_once(tmp_path: Path) -> None:
    """Chunks that a merged one stands for are not read again when their removal failed."""
    kept = Forgetful(tmp_path)
    written(kept, days(0.2))
    assert kept.refused
    history = known(read(kept))
    points = [point.at for point in history.series("loss").points()]
    assert len(points) == len(set(points))


class Forgetful(Quick):
    """Deletes nothing."""

    refused = 0

    def delete(self, prefix: str) -> None:
        self.refused += 1


def test_attempts_and_events_are_remembered(tmp_path: Path) -> None:
    """Several attempts go on in one history, which knows which was which."""
    storage = FileStorage(tmp_path)
    event = wire.GangEvent(1, BEGAN, "checkpoint", "checkpoint step-000010.g0001", 1, step=10)
    for attempt in (1, 2):
        writer = HistoryWriter(storage, attempt=attempt, term=1)
        told = dataclasses.replace(event, seq=attempt, at=BEGAN + attempt)
        writer.write([window(attempt * 10), told])
    history = known(read(storage))
    assert history.attempt == 2
    assert [mark.text for mark in history.marks if mark.kind == "checkpoint"] == [event.text] * 2
