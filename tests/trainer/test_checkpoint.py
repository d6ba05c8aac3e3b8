"""Promises of checkpoints: whole or absent, never from the past, the same at any world size."""

from __future__ import annotations

import json
import logging
import random
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtp_trainer.checkpoints import commit, heads
from dtp_trainer.checkpoints.checkpoint import (
    Checkpointer,
    Outcome,
    SaveReport,
    StateBundle,
    load,
    load_newest,
)
from dtp_trainer.checkpoints.heads import Fenced, Retention
from dtp_trainer.checkpoints.manifest import DamagedCheckpoint, verify
from dtp_trainer.checkpoints.tree import UnsupportedState
from dtp_trainer.session import randomness
from dtp_trainer.storage import FileStorage, StorageError
from dtp_trainer.wire import checkpoint_name


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path)


class Training:
    """A model and its optimizer, a few steps in."""

    def __init__(self, steps: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(6, 8)).square().mean().backward()
        self.optimizer.step()

    def bundle(self, rank: int = 0) -> StateBundle:
        shared = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return StateBundle(shared, {"rank": rank, "noise": torch.tensor([rank, 7])})

    def load(self, shared: Any) -> None:
        self.model.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])

    def numbers(self) -> torch.Tensor:
        states = self.optimizer.state_dict()["state"].values()
        tensors = [*self.model.state_dict().values(), *(t for s in states for t in s.values())]
        return torch.cat([t.double().reshape(-1) for t in tensors])


def checkpointers(
    store: FileStorage, generation: int, world: int = 1, **policy: Any
) -> list[Checkpointer]:
    return [
        Checkpointer(
            store,
            generation=generation,
            attempt=1,
            rank=rank,
            world_size=world,
            policy=Retention(**policy),
            job="j",
        )
        for rank in range(world)
    ]


def save(ranks: list[Checkpointer], training: Training, step: int, **values: float) -> SaveReport:
    """As a process group would: the other ranks first, then rank 0 until the commit."""
    report = None
    for rank, checkpointer in reversed(list(enumerate(ranks))):
        report = checkpointer.save(
            training.bundle(rank),
            step=step,
            epoch=step / 10,
            values=values,
            data_state={"epoch": 0, "step": step},
            blocking=rank == 0,
        )
    assert report is not None
    return report


def committed(store: FileStorage) -> list[int]:
    return [entry.step for entry in heads.read_head(store).entries]


def folders(store: FileStorage) -> set[str]:
    return {e.key.split("/")[1] for e in store.list("checkpoints/") if e.key.count("/") > 1}


def files_of(store: FileStorage, step: int, generation: int = 1) -> list[Path]:
    folder = store.root / "checkpoints" / checkpoint_name(step, generation)
    return sorted(folder.glob("*.safetensors"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# --------------------------------------------------------------------------------- save and load


def test_a_saved_state_is_loaded_exactly(store: FileStorage) -> None:
    """Model, optimizer, position and values come back as they were at the step."""
    training = Training()
    before = training.numbers()
    [checkpointer] = checkpointers(store, 1)
    report = save([checkpointer], training, 5, loss=0.5)
    assert (report.outcome, report.error, report.entry) == (
        Outcome.COMMITTED,
        None,
        checkpointer.last_committed,
    )
    training.step()
    loaded = load_newest(store)
    assert loaded
    fresh = Training(seed=1)
    fresh.load(loaded.shared)
    assert torch.equal(fresh.numbers(), before)
    assert (loaded.step, loaded.epoch, loaded.values) == (5, 0.5, {"loss": 0.5})
    assert loaded.data_state == {"epoch": 0, "step": 5}
    assert loaded.own
    assert loaded.own["noise"].tolist() == [0, 7]
    assert loaded.entry.verified


def test_no_checkpoint_is_none(store: FileStorage) -> None:
    """A job that has not saved yet begins at the beginning."""
    heads.raise_generation(store)
    assert load_newest(store) is None


def test_a_background_save_holds_the_state_of_its_call(store: FileStorage) -> None:
    """Training goes on while a save is written, and does not change what is written."""
    training = Training()
    before = training.numbers()
    [checkpointer] = checkpointers(store, 1)
    where: dict[str, Any] = {"step": 1, "epoch": 0.0, "values": {}, "data_state": {}}
    assert checkpointer.save(training.bundle(), **where) is None
    for _ in range(5):
        training.step()
    report = checkpointer.wait()
    assert report
    assert report.outcome is Outcome.COMMITTED
    loaded = load_newest(store)
    assert loaded
    training.load(loaded.shared)
    assert torch.equal(training.numbers(), before)


def test_buffers_are_allocated_once(store: FileStorage) -> None:
    """After `prepare` no save takes new memory for its tensors."""
    training = Training()
    [checkpointer] = checkpointers(store, 1)
    checkpointer.prepare(training.bundle())
    memory = checkpointer._staging._buffer.data_ptr()
    for step in range(3):
        training.step()
        save([checkpointer], training, step)
    assert checkpointer._staging._buffer.data_ptr() == memory
    checkpointer.close()
    assert checkpointer._staging._buffer.numel() == 0


def test_state_that_grows_is_saved_whole(store: FileStorage) -> None:
    """The optimizer's state, which appears with the first step, makes the next save larger."""
    training = Training(steps=0)
    [checkpointer] = checkpointers(store, 1)
    first = save([checkpointer], training, 0)
    training.step()
    assert save([checkpointer], training, 1).bytes > first.bytes
    loaded = load_newest(store)
    assert loaded
    fresh = Training()
    fresh.load(loaded.shared)
    assert torch.equal(fresh.numbers(), training.numbers())


def test_worlds_change_from_one_to_two_to_three_to_one(store: FileStorage) -> None:
    """A state saved by one, two and three ranks is the same value for value at any world size."""
    training = Training(steps=1)
    for generation, (world, following) in enumerate([(1, 2), (2, 3), (3, 1)], start=1):
        training.step()
        ranks = checkpointers(store, generation, world)
        save(ranks, training, generation)
        sizes = [path.stat().st_size for path in files_of(store, generation, generation)]
        assert len(sizes) == world
        assert max(sizes) < 2 * min(sizes)
        expected = training.numbers()
        for rank in range(following):
            loaded = load_newest(store, rank=rank, world_size=following)
            assert loaded
            assert loaded.own is None
            fresh = Training(seed=9)
            fresh.load(loaded.shared)
            assert torch.equal(fresh.numbers(), expected)


def test_each_rank_gets_its_own_state_back(store: FileStorage) -> None:
    """At the same world size every rank finds what it alone had saved."""
    save(checkpointers(store, 1, 3), Training(), 1)
    for rank in range(3):
        own = load(store, checkpoint_name(1, 1), rank=rank, world_size=3).own
        assert own
        assert (own["rank"], own["noise"].tolist()) == (rank, [rank, 7])


def test_random_numbers_go_on_where_they_were(store: FileStorage) -> None:
    """The generators of Python, numpy and torch give the same numbers after a restart."""
    [checkpointer] = checkpointers(store, 1)
    own = randomness.capture(torch.device("cpu"))
    checkpointer.save(
        StateBundle({}, own), step=1, epoch=0, values={}, data_state={}, blocking=True
    )
    expected = random.random(), torch.rand(3).tolist()
    loaded = load_newest(store)
    assert loaded
    assert loaded.own
    randomness.restore(loaded.own, torch.device("cpu"))
    assert (random.random(), torch.rand(3).tolist()) == expected


def test_a_step_is_saved_once(store: FileStorage) -> None:
    """A second save of a step changes no file, on rank 0 as on the others."""
    training, ranks = Training(), checkpointers(store, 1, 2)
    save(ranks, training, 3)
    before = {p: (p.stat().st_ino, p.read_bytes()) for p in files_of(store, 3)}
    training.step()
    assert save(ranks, training, 3).outcome is Outcome.COMMITTED
    assert {p: (p.stat().st_ino, p.read_bytes()) for p in files_of(store, 3)} == before


def test_state_that_cannot_be_kept_is_refused_at_once(store: FileStorage) -> None:
    """A state that no checkpoint can hold raises in the caller, naming its path."""
    [checkpointer] = checkpointers(store, 1)
    where: dict[str, Any] = {"step": 1, "epoch": 0.0, "values": {}}
    with pytest.raises(UnsupportedState, match=r"shared\.x is a builtins\.object"):
        checkpointer.save(StateBundle({"x": object()}), **where, data_state={})
    with pytest.raises(UnsupportedState, match="data_state must be plain JSON"):
        checkpointer.save(StateBundle({}), **where, data_state={"x": object()})
    assert save([checkpointer], Training(), 1).outcome is Outcome.COMMITTED


# ----------------------------------------------------------------------------------------- damage


@pytest.fixture
def two_saved(store: FileStorage) -> FileStorage:
    """Checkpoints of steps 1 and 2 by two ranks."""
    ranks, training = checkpointers(store, 1, 2), Training()
    for step in (1, 2):
        training.step()
        save(ranks, training, step)
    return store


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("bit", r"rank-00001-of-00002\.safetensors has sha256 \w{12}…, its manifest says \w{12}…"),
        ("header", r"rank-00001-of-00002\.safetensors has sha256"),
        ("cut", r"rank-00001-of-00002\.safetensors has \d+ bytes, its manifest says \d+"),
        ("gone", r"rank-00001-of-00002\.safetensors cannot be read: there is no"),
        ("manifest bit", r"manifest\.json has sha256 \w{12}…, its manifest says"),
        ("manifest cut", r"manifest\.json is not a manifest"),
        ("manifest gone", r"manifest\.json cannot be read: there is no"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_aloud(
    two_saved: FileStorage, damage: str, said: str
) -> None:
    """Whatever happened to the newest checkpoint, the one before is used and the damage told."""
    file = files_of(two_saved, 2)[1]
    manifest_file = file.with_name("manifest.json")
    match damage:
        case "bit":
            flip(file, 8 * file.stat().st_size - 9)
        case "header":
            flip(file, 8 * 20)
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "gone":
            file.unlink()
        case "manifest bit":
            manifest_file.write_text(manifest_file.read_text().replace('"step": 2', '"step": 3'))
        case "manifest cut":
            manifest_file.write_bytes(manifest_file.read_bytes()[:-9])
        case "manifest gone":
            manifest_file.unlink()
    told: list[str] = []
    loaded = load_newest(two_saved, on_damage=told.append)
    assert loaded
    assert loaded.step == 1
    [line] = told
    assert line.startswith("checkpoint step-000002.g0001 is damaged: step-000002.g0001/")
    assert line.endswith("; trying step-000001.g0001 instead")
    assert re.search(said, line), line
    marks = [entry.verified for entry in heads.read_head(two_saved).entries]
    assert marks == [True, False]


def test_when_no_checkpoint_is_whole_nothing_begins_in_silence(two_saved: FileStorage) -> None:
    """A job all of whose checkpoints are damaged stops and says so; it does not begin anew."""
    for step in (1, 2):
        flip(files_of(two_saved, step)[0], 8000)
    with pytest.raises(DamagedCheckpoint, match=r"none of the 2 checkpoints in .* is whole"):
        load_newest(two_saved, on_damage=lambda _: None)


def test_resume_from_an_older_step_loads_it(two_saved: FileStorage) -> None:
    """The resume point that a person chose is loaded, not the newest."""
    heads.set_resume(two_saved, "1")
    loaded = load_newest(two_saved)
    assert loaded
    assert loaded.step == 1


def test_a_manifest_of_a_newer_format_stops_the_load(two_saved: FileStorage) -> None:
    """What a newer version wrote is not mistaken for damage."""
    path = files_of(two_saved, 2)[0].with_name("manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(StorageError, match="format 99, this dtp reads 2"):
        load_newest(two_saved)


# -------------------------------------------------------------------------------------- the fence


def test_an_older_generation_cannot_commit(store: FileStorage) -> None:
    """After the fence was raised, the older generation's save is refused aloud and for good."""
    training, ranks = Training(), checkpointers(store, 1, 2)
    save(ranks, training, 1)
    heads.raise_generation(store)
    with pytest.raises(Fenced, match="generation 1 was replaced by generation 2"):
        save(ranks, training, 2)
    with pytest.raises(Fenced):
        ranks[0].save(training.bundle(), step=3, epoch=0, values={}, data_state={})
    assert committed(store) == [1]
    following = checkpointers(store, 2)
    assert save(following, training, 2).outcome is Outcome.COMMITTED
    following[0].close()
    assert folders(store) == {checkpoint_name(1, 1), checkpoint_name(2, 2)}


def test_a_fenced_rank_stops_waiting_for_the_others(
    store: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 that waits for dead ranks learns from the fence that it is over."""
    monkeypatch.setattr(commit, "_FENCE_EVERY_S", 0.05)
    reports: list[SaveReport] = []
    alone = Checkpointer(
        store,
        generation=1,
        attempt=1,
        rank=0,
        world_size=2,
        policy=Retention(),
        on_report=reports.append,
    )
    alone.save(Training().bundle(), step=1, epoch=0, values={}, data_state={})
    heads.raise_generation(store)
    heads.raise_generation(store)
    with pytest.raises(Fenced):
        alone.wait()
    assert [r.outcome for r in reports] == [Outcome.FENCED]
    assert committed(store) == []


# ---------------------------------------------------------------------------------------- failures


def test_a_missing_share_fails_the_save_only(
    store: FileStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When a rank never writes its share, the save fails in time and the next one succeeds."""
    monkeypatch.setattr(commit, "_GATHER_WITHIN_S", 0.1)
    training, ranks = Training(), checkpointers(store, 1, 2)
    report = ranks[0].save(
        training.bundle(), step=1, epoch=0, values={}, data_state={}, blocking=True
    )
    assert report
    assert report.outcome is Outcome.FAILED
    assert report.error == "ranks [1] wrote no share within 0 s"
    assert "training goes on" in caplog.text
    ranks[1].save(training.bundle(1), step=1, epoch=0, values={}, data_state={}, blocking=True)
    assert save(ranks, training, 2).outcome is Outcome.COMMITTED
    ranks[0].close()
    assert folders(store) == {checkpoint_name(2, 1)}


def test_a_rank_that_fails_is_named_at_once(store: FileStorage) -> None:
    """Rank 0 reports the error of another rank instead of waiting for its share."""
    training, ranks = Training(), checkpointers(store, 1, 2)
    folder = store.root / "checkpoints" / checkpoint_name(1, 1)
    (folder / "rank-00001-of-00002.safetensors").mkdir(parents=True)
    report = save(ranks, training, 1)
    assert report.outcome is Outcome.FAILED
    assert report.error
    assert report.error.startswith("rank 1: cannot write checkpoints/step-000001.g0001/rank-00001")
    assert "a folder has that name" in report.error
    (folder / "rank-00001-of-00002.safetensors").rmdir()
    assert save(ranks, training, 1).outcome is Outcome.COMMITTED
    verify(store, checkpoint_name(1, 1))


def test_a_file_that_may_not_grow_fails_the_save_only(store: FileStorage) -> None:
    """Where the system cuts a file short, as a quota does, the save fails with the reason, nothing
    half written is taken for a checkpoint, and the next one that fits is committed."""
    [checkpointer] = checkpointers(store, 1)
    save([checkpointer], Training(), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        report = save([checkpointer], Training(), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert report.outcome is Outcome.FAILED
    assert report.error
    assert "the file is larger than this process or file system allows" in report.error
    loaded = load_newest(store)
    assert loaded
    assert loaded.step == 1
    assert save([checkpointer], Training(), 3).outcome is Outcome.COMMITTED
    checkpointer.close()
    assert folders(store) == {checkpoint_name(1, 1), checkpoint_name(3, 1)}


def test_a_full_disk_fails_the_save_and_keeps_the_one_before(small_disk: Path) -> None:
    """A full disk is reported; training goes on, the last checkpoint is whole, a later one fits."""
    store = FileStorage(small_disk)
    small, large = Training(), nn.Linear(1000, 600)
    [checkpointer] = checkpointers(store, 1)
    save([checkpointer], small, 1)
    report = checkpointer.save(
        StateBundle({"model": large.state_dict()}),
        step=2,
        epoch=0,
        values={},
        data_state={},
        blocking=True,
    )
    assert report
    assert report.outcome is Outcome.FAILED
    assert report.error
    assert "the disk is full; free some space" in report.error
    loaded = load_newest(store)
    assert loaded
    assert loaded.step == 1
    assert save([checkpointer], small, 3).outcome is Outcome.COMMITTED
    checkpointer.close()
    assert folders(store) == {checkpoint_name(1, 1), checkpoint_name(3, 1)}


# --------------------------------------------------------------------------------------- retention


@pytest.fixture
def settled() -> Callable[..., None]:
    """Saves by one rank whose tidying is finished when the call returns."""

    def saved(store: FileStorage, steps: Any, **policy: Any) -> None:
        [checkpointer] = checkpointers(store, 1, **policy)
        for step, loss in steps:
            save([checkpointer], Training(0), step, loss=loss)
            checkpointer._join()

    return saved


def test_retention_keeps_the_newest(store: FileStorage, settled: Callable[..., None]) -> None:
    """Only the newest stay, in the list and on the disk, and two of them are checked."""
    settled(store, [(step, 1.0) for step in range(6)], keep=3)
    assert committed(store) == [3, 4, 5]
    assert folders(store) == {checkpoint_name(step, 1) for step in (3, 4, 5)}
    assert [e.verified for e in heads.read_head(store).entries].count(True) >= 2


def test_retention_keeps_the_best_and_the_pinned(
    store: FileStorage, settled: Callable[..., None]
) -> None:
    """The checkpoint with the best value, and pinned ones, outlive the newest."""
    losses = [5.0, 1.0, 4.0, 3.0, 6.0, 7.0]
    settled(store, enumerate(losses[:1]), keep=2, keep_best="loss")
    heads.pin(store, "0")
    settled(store, list(enumerate(losses))[1:], keep=2, keep_best="loss")
    assert committed(store) == [0, 1, 4, 5]


def test_nothing_is_given_up_before_two_are_known_to_be_whole(
    store: FileStorage, settled: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint that went bad on the disk is found before it makes an older one go."""
    settled(store, [(1, 1.0), (2, 1.0)], keep=2)
    flip(files_of(store, 2)[0], 8000)
    with caplog.at_level(logging.WARNING):
        settled(store, [(3, 1.0)], keep=2)
    assert "checkpoint step-000002.g0001 is damaged" in caplog.text
    assert committed(store) == [1, 3]
    assert folders(store) == {checkpoint_name(1, 1), checkpoint_name(3, 1)}


def test_reading_back_is_put_off_once(store: FileStorage, settled: Callable[..., None]) -> None:
    """Reading back waits for a save that somebody waits for, but not for ever."""
    settled(store, [(step, 1.0) for step in range(4)], keep=9)
    committer = commit.Committer(store, generation=1, policy=Retention(keep=2))
    committer.hurried.set()
    committer.tidy(4)
    assert committed(store) == [0, 1, 2, 3]
    committer.tidy(4)
    assert committed(store) == [2, 3]


def test_litter_of_older_generations_is_swept(store: FileStorage) -> None:
    """Folders that never became checkpoints go with the next generation's first commit."""
    store.write(f"checkpoints/{checkpoint_name(7, 1)}/rank-00000-of-00001.safetensors", b"half")
    store.write("checkpoints/notes.txt", b"somebody's own")
    save(checkpointers(store, 1), Training(0), 5)
    ranks = checkpointers(store, 2)
    save(ranks, Training(0), 6)
    ranks[0].close()
    assert folders(store) == {checkpoint_name(5, 1), checkpoint_name(6, 2)}
    assert store.read("checkpoints/notes.txt") == b"somebody's own"
