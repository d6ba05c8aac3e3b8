"""Promises of checkpoints in S3: as in a folder, and where S3 refuses, named and gone around."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dtp_trainer import s3 as s3_module
from dtp_trainer.checkpoints import heads
from dtp_trainer.checkpoints.checkpoint import (
    Checkpointer,
    Outcome,
    SaveReport,
    StateBundle,
    load_newest,
)
from dtp_trainer.checkpoints.heads import Fenced, Retention
from dtp_trainer.checkpoints.manifest import UnreadableCheckpoint, verify
from dtp_trainer.s3 import S3Storage
from dtp_trainer.storage import Storage, StorageError
from dtp_trainer.wire import HEAD_KEY, checkpoint_name


def ranks(storage: Storage, generation: int, world: int = 2, keep: int = 3) -> list[Checkpointer]:
    return [
        Checkpointer(
            storage,
            generation=generation,
            attempt=1,
            rank=rank,
            world_size=world,
            policy=Retention(keep=keep),
        )
        for rank in range(world)
    ]


def save(savers: list[Checkpointer], step: int) -> SaveReport:
    """Every number of it is the step."""
    report = None
    for rank, saver in reversed(list(enumerate(savers))):
        shared = {name: torch.full((1000,), float(step)) for name in ("a", "b")}
        report = saver.save(
            StateBundle({**shared, "step": step}, {"rank": rank}),
            step=step,
            epoch=0.0,
            values={},
            data_state={"step": step},
            blocking=rank == 0,
        )
    assert report
    return report


def is_whole(loaded: Any, step: int) -> bool:
    same = [bool((loaded.shared[name] == step).all()) for name in ("a", "b")]
    return all(same) and loaded.step == loaded.shared["step"] == step


def behind(proxy: Any, s3: S3Storage) -> S3Storage:
    return S3Storage(s3._bucket, s3._prefix, endpoint=proxy.url)


def test_checkpoints_live_in_s3_as_in_a_folder(s3: S3Storage) -> None:
    """Saved by two ranks, loaded by three; retention deletes, the fence holds, every hash fits."""
    savers = ranks(s3, 1, keep=2)
    for step in range(1, 5):
        assert save(savers, step).outcome is Outcome.COMMITTED
    savers[0].close()
    assert [entry.step for entry in heads.read_head(s3).entries] == [3, 4]
    folders = {entry.key.split("/")[1] for entry in s3.list("checkpoints/step-")}
    assert folders == {checkpoint_name(3, 1), checkpoint_name(4, 1)}
    verify(s3, checkpoint_name(4, 1))
    loaded = load_newest(s3, rank=2, world_size=3)
    assert is_whole(loaded, 4)
    heads.raise_generation(s3)
    heads.raise_generation(s3)
    with pytest.raises(Fenced):
        save(ranks(s3, 1), 5)


@pytest.mark.parametrize("fault", [403, 503, -400])
@pytest.mark.parametrize("file", ["manifest.json", "rank-00001-of-00002.safetensors"])
def test_where_s3_refuses_the_newest_the_one_before_is_loaded(
    s3: S3Storage, faulty: Any, monkeypatch: pytest.MonkeyPatch, fault: int, file: str
) -> None:
    """Denied, throttled or cut short: the file is named, the one before is loaded, and the newest
    is not taken for damaged, because nobody knows."""
    monkeypatch.setattr(s3_module, "_PAUSE_S", 0.001)
    savers = ranks(s3, 1)
    save(savers, 1)
    save(savers, 2)
    newest = f"{checkpoint_name(2, 1)}/{file}"
    faulty.fault = lambda method, path: fault if method == "GET" and newest in path else None
    told: list[str] = []
    loaded = load_newest(behind(faulty, s3), world_size=2, on_damage=told.append)
    assert is_whole(loaded, 1)
    [line] = told
    assert line.startswith(f"checkpoint {checkpoint_name(2, 1)} cannot be read: {newest}")
    assert line.endswith(f"; trying {checkpoint_name(1, 1)} instead")
    assert [entry.verified for entry in heads.read_head(s3).entries] == [True, None]
    with pytest.raises(UnreadableCheckpoint):
        verify(behind(faulty, s3), checkpoint_name(2, 1))


def test_a_head_that_s3_refuses_begins_nothing(s3: S3Storage, faulty: Any) -> None:
    """A job whose list of checkpoints cannot be read does not begin anew in silence."""
    save(ranks(s3, 1), 1)
    faulty.fault = lambda method, path: 403 if HEAD_KEY in path else None
    with pytest.raises(StorageError, match="access denied"):
        load_newest(behind(faulty, s3))


def test_a_save_that_s3_refuses_is_tried_again_with_the_next(s3: S3Storage, faulty: Any) -> None:
    """A refused upload fails its checkpoint and is named; the one before stays, training goes on,
    and the next one succeeds."""
    savers = ranks(behind(faulty, s3), 1)
    save(savers, 1)

    def refuse_share(method: str, path: str) -> int | None:
        is_note = ".json" in path
        return 503 if method == "PUT" and "rank-00001" in path and not is_note else None

    faulty.fault = refuse_share
    report = save(savers, 2)
    assert report.outcome is Outcome.FAILED
    assert report.error
    assert report.error.startswith("rank 1: cannot write checkpoints/step-000002.g0001/rank-00001")
    assert "SlowDown" in report.error
    assert is_whole(load_newest(s3), 1)
    faulty.fault = lambda _method, _path: None
    assert save(savers, 3).outcome is Outcome.COMMITTED
    savers[0].close()
    assert is_whole(load_newest(s3), 3)
