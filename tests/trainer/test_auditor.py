"""Promises of the background check: the newest checkpoint is read back, the damage in it told."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from dtp_trainer.checkpoints import heads
from dtp_trainer.checkpoints.checkpoint import Checkpointer, StateBundle
from dtp_trainer.checkpoints.heads import Retention
from dtp_trainer.gang import auditor
from dtp_trainer.gang.auditor import Auditor, auditing
from dtp_trainer.gang.state import Noted
from dtp_trainer.storage import FileStorage


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    """With checkpoints of steps 1 and 2."""
    store = FileStorage(tmp_path)
    for step in (1, 2):
        save(store, step)
    return store


def save(store: FileStorage, step: int) -> None:
    Checkpointer(store, generation=step, attempt=1, rank=0, world_size=1, policy=Retention()).save(
        StateBundle({"w": torch.full((5000,), float(step))}),
        step=step,
        epoch=0.0,
        values={},
        data_state={},
        blocking=True,
    )


def marks(store: FileStorage) -> list[bool | None]:
    return [entry.verified for entry in heads.read_head(store).entries]


def test_the_newest_is_read_back_once(store: FileStorage) -> None:
    """A whole one is marked good; the ones before it are not read."""
    told: list[Noted] = []
    audits = Auditor(store, told.append)
    audits.look()
    assert marks(store) == [None, True]
    [file] = (store.root / "checkpoints" / "step-000002.g0002").glob("*.safetensors")
    file.unlink()
    audits.look()
    assert (marks(store), told) == ([None, True], [])


def test_damage_is_told_while_it_trains(
    store: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit in the newest one is found in the background, marked and told on the loop."""
    monkeypatch.setattr(auditor, "LOOK_EVERY_S", 0.01)
    [file] = (store.root / "checkpoints" / "step-000002.g0002").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    async def train() -> Noted:
        told: asyncio.Queue[Noted] = asyncio.Queue()
        with auditing(store, told.put_nowait):
            return await asyncio.wait_for(told.get(), 20)

    noted = asyncio.run(train())
    assert noted.name == "checkpoint_damaged"
    assert noted.text.startswith(
        f"checkpoint step-000002.g0002 is damaged: step-000002.g0002/{file.name} has sha256"
    )
    assert marks(store) == [None, False]
    save(store, 3)
    assert [entry.step for entry in heads.candidates(heads.read_head(store))] == [3, 1, 2]


def test_a_leader_that_leaves_does_not_wait_for_it(
    store: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading back ends at the next rest, marks nothing, and its thread is gone."""
    monkeypatch.setattr(auditor, "REST", 1e6)
    monkeypatch.setattr(auditor, "LOOK_EVERY_S", 0.0)
    audits = Auditor(store, lambda _: None)
    audits.start()
    audits.stop()
    deadline = time.monotonic() + 20
    while any(t.name == "audit" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "audit" for thread in threading.enumerate())
    with pytest.raises(InterruptedError):
        audits.look()
    assert marks(store) == [None, None]
