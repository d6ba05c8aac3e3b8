"""Promises of the checkpoint head: the fence, the order of candidates, what retention gives up."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtp_trainer.checkpoints import heads
from dtp_trainer.checkpoints.heads import Fenced, Retention, UnknownCheckpoint
from dtp_trainer.storage import FileStorage
from dtp_trainer.wire import HEAD_KEY, CheckpointEntry, CheckpointHead, checkpoint_name


def entry(step: int, generation: int = 1, **changes: object) -> CheckpointEntry:
    values: dict[str, object] = {
        "name": checkpoint_name(step, generation),
        "step": step,
        "generation": generation,
        "attempt": 1,
        "world_size": 1,
        "at": float(step),
        "bytes": 1,
        **changes,
    }
    return CheckpointEntry(**values)  # type: ignore[arg-type]


def head_of(*entries: CheckpointEntry, resume: str | None = None) -> CheckpointHead:
    return CheckpointHead(max((e.generation for e in entries), default=0), resume, entries)


def steps(entries: Sequence[CheckpointEntry]) -> list[int]:
    return [e.step for e in entries]


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path)


def test_a_new_generation_refuses_the_older_one(store: FileStorage) -> None:
    """After the fence was raised, a commit of the older generation changes nothing and is loud."""
    assert heads.raise_generation(store).generation == 1
    heads.commit(store, entry(10, 1))
    assert heads.raise_generation(store).generation == 2
    before = store.read(HEAD_KEY)
    with pytest.raises(Fenced, match="generation 1 was replaced by generation 2"):
        heads.commit(store, entry(20, 1))
    with pytest.raises(Fenced):
        heads.drop(store, [entry(10, 1).name], generation=1)
    assert store.read(HEAD_KEY) == before


def test_each_generation_has_one_owner(store: FileStorage) -> None:
    """Leaders that raise the fence at the same moment get different generations."""
    seen: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: seen.extend(heads.raise_generation(store).generation for _ in range(10))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(seen) == list(range(1, 41))


def test_a_commit_is_the_next_resume_point(store: FileStorage) -> None:
    """A commit lists the checkpoint and sets the resume point; again with one name, once."""
    heads.raise_generation(store)
    heads.commit(store, entry(1))
    heads.commit(store, entry(2))
    head = heads.commit(store, entry(2, bytes=7))
    assert steps(head.entries) == [1, 2]
    assert (head.resume, head.entries[-1].bytes) == (entry(2).name, 7)
    assert heads.read_head(store) == head


def test_people_pin_and_choose_by_name_or_step(store: FileStorage) -> None:
    """Pin and resume take a name or a step; of two with one step the newest generation counts."""
    heads.commit(store, entry(5, 1))
    heads.commit(store, entry(5, 2))
    heads.commit(store, entry(9, 2))
    assert heads.pin(store, "5").generation == 2
    assert heads.pin(store, entry(5, 1).name).pinned
    assert not heads.pin(store, "5", pinned=False).pinned
    assert heads.set_resume(store, "5").name == entry(5, 2).name
    assert heads.read_head(store).resume == entry(5, 2).name


def test_an_unknown_checkpoint_names_those_there_are(store: FileStorage) -> None:
    """A wrong name or step is answered with the steps there are and the nearest name."""
    with pytest.raises(UnknownCheckpoint, match="has none yet"):
        heads.set_resume(store, "5")
    heads.commit(store, entry(5))
    heads.commit(store, entry(120))
    with pytest.raises(UnknownCheckpoint, match=r"steps 5, 120; did you mean step-000120.g0001"):
        heads.pin(store, "step-000121.g0001")


def test_a_damaged_head_is_one_line(store: FileStorage) -> None:
    """A head that is no JSON object of ours says what to do."""
    for data in (b"{", b"[]", b'{"entries": [{"name": "x"}]}'):
        store.write(HEAD_KEY, data)
        with pytest.raises(heads.DamagedHead, match=r"is damaged: restore it"):
            heads.read_head(store)


def test_candidates_begin_at_the_resume_point() -> None:
    """A start tries the resume point, then what is before it, then the rest, newest first."""
    entries = (entry(10, 1), entry(20, 1), entry(15, 2), entry(25, 2))
    assert steps(heads.candidates(head_of(*entries))) == [25, 15, 20, 10]
    chosen = head_of(*entries, resume=entry(20, 1).name)
    assert steps(heads.candidates(chosen)) == [20, 10, 25, 15]
    assert steps(heads.candidates(head_of(*entries, resume="gone"))) == [25, 15, 20, 10]


def test_retention_keeps_newest_best_pinned_and_chosen() -> None:
    """Given up is what is not among the newest, the best, the pinned or the resume point."""
    losses = [9.0, 1.0, 5.0, float("nan"), 4.0, 3.0, 2.0]
    entries = [entry(n, values={"loss": loss}) for n, loss in enumerate(losses)]
    entries[0] = entry(0, pinned=True)
    head = head_of(*entries, resume=entries[2].name)
    assert steps(heads.surplus(head, Retention(keep=2, keep_best="loss"))) == [3, 4]
    assert steps(heads.surplus(head, Retention(keep=2))) == [1, 3, 4]


def test_the_best_is_highest_unless_it_is_a_loss_or_an_error() -> None:
    """Accuracy is better when higher, loss and error when smaller; of equals the newest."""
    entries = [entry(n, values={"accuracy": v, "val_error": v}) for n, v in enumerate([1, 2, 2, 1])]
    assert heads.best_entry(entries, "accuracy") == entries[2]
    assert heads.best_entry(entries, "val_error") == entries[3]
    assert heads.best_entry(entries, "missing") is None


@given(
    st.lists(
        st.tuples(st.sampled_from([True, False, None]), st.booleans()), min_size=1, max_size=12
    ),
    st.integers(0, 5),
)
def test_retention_never_leaves_fewer_than_two_sound_ones(
    marks: list[tuple[bool | None, bool]], keep: int
) -> None:
    """Whatever is damaged: the two newest sound, and the two newest verified, always stay."""
    entries = [entry(n, verified=v, pinned=p) for n, (v, p) in enumerate(marks)]
    gone = heads.surplus(head_of(*entries), Retention(keep=keep))
    sound = [e for e in entries if e.verified is not False]
    assert not set(steps(gone)) & set(steps(sound[-2:]))
    assert not set(steps(gone)) & set(steps([e for e in sound if e.verified][-2:]))
    assert not any(e.pinned for e in gone)


def test_what_was_pinned_meanwhile_is_not_dropped(store: FileStorage) -> None:
    """Dropping re-reads the head: a pin or a choice made in between wins."""
    for step in (1, 2, 3):
        heads.commit(store, entry(step))
    heads.pin(store, "1")
    head = heads.drop(store, [entry(step).name for step in (1, 2, 3)], generation=1)
    assert steps(head.entries) == [1, 3]


def test_marks_of_checks_are_kept(store: FileStorage) -> None:
    """The outcome of a check stays with its checkpoint; one that is gone is no error."""
    heads.commit(store, entry(1))
    heads.set_verified(store, entry(1).name, verified=False)
    heads.set_verified(store, "gone", verified=True)
    assert heads.read_head(store).entries[0].verified is False


def test_heads_import_no_torch() -> None:
    """Agent and engine can use the head without paying for torch."""
    loaded = "print('torch' in sys.modules, 'numpy' in sys.modules)"
    code = f"import sys, dtp_trainer.checkpoints.heads; {loaded}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"False", b"False"]
