"""Promises of tensors kept in pieces: each rank writes its rows, and any number reads the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtp_trainer.checkpoints import heads, manifest
from dtp_trainer.checkpoints.checkpoint import Checkpointer, Outcome, SaveReport, StateBundle, load
from dtp_trainer.checkpoints.heads import Retention
from dtp_trainer.checkpoints.manifest import DamagedCheckpoint
from dtp_trainer.checkpoints.pieces import Part, Piece
from dtp_trainer.checkpoints.tree import UnsupportedState, flatten
from dtp_trainer.storage import FileStorage
from dtp_trainer.wire import checkpoint_name


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path)


def piece(whole: Tensor, rank: int, world: int) -> Piece:
    """A rank's rows, as FSDP deals them: some ranks may have none."""
    rows = whole.shape[0] if whole.dim() else 1
    chunk = -(-rows // world)
    start = min(rank * chunk, rows)
    data = None if rank else whole
    if whole.dim():
        data = whole[start : start + chunk]
    return Piece(tuple(whole.shape), whole.dtype, start, data)


def owned(whole: Tensor, rank: int, owner: int) -> Piece:
    """All of it, or nothing."""
    stride = None if whole.is_contiguous() else whole.stride()
    data = whole if rank == owner else None
    return Piece(tuple(whole.shape), whole.dtype, 0, data, stride)


def tensors(step: int = 0) -> dict[str, Tensor]:
    return {
        "rows": torch.arange(35.0).reshape(7, 5) + step,
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "empty": torch.zeros(0, 4),
        "thin": torch.zeros(4, 0),
        "number": torch.tensor(3.5 + step),
        "flags": torch.arange(5) > 2,
    }


def bundle(wholes: dict[str, Tensor], rank: int, world: int) -> StateBundle:
    parts: dict[str, Any] = {name: piece(t, rank, world) for name, t in wholes.items()}
    turned = torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2)
    parts["turned"] = owned(turned, rank, owner=world - 1)
    parts["tied"] = parts["rows"]
    plain = {"same": torch.arange(4.0), "rows#0": torch.ones(2)}
    return StateBundle({"parts": parts, **plain}, {"rank": rank})


def save(
    store: FileStorage, step: int, world: int, ranks: list[Checkpointer] | None = None
) -> SaveReport:
    ranks = ranks or checkpointers(store, world)
    report = None
    for rank, checkpointer in reversed(list(enumerate(ranks))):
        report = checkpointer.save(
            bundle(tensors(step), rank, world),
            step=step,
            epoch=0,
            values={},
            data_state={},
            blocking=rank == 0,
        )
    assert report is not None
    return report


def checkpointers(store: FileStorage, world: int) -> list[Checkpointer]:
    return [
        Checkpointer(
            store, generation=1, attempt=1, rank=rank, world_size=world, policy=Retention()
        )
        for rank in range(world)
    ]


def files(store: FileStorage, step: int) -> list[Path]:
    return sorted((store.root / "checkpoints" / checkpoint_name(step, 1)).glob("*.safetensors"))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_pieces_of_any_number_of_ranks_make_the_whole(store: FileStorage, world: int) -> None:
    """Every rank of any number of ranks reads what eight, three, two or one had in pieces, whole;
    uneven rows, ranks without any, numbers, and layouts included."""
    assert save(store, 1, world).outcome is Outcome.COMMITTED
    loaded = load(store, checkpoint_name(1, 1), rank=1, world_size=2)
    parts = loaded.shared["parts"]
    for name, whole in tensors(1).items():
        assert parts[name].dtype == whole.dtype
        assert torch.equal(parts[name], whole)
    assert parts["turned"].stride() == (1, 4, 12)
    assert parts["turned"][3, 2, 1] == 23
    assert parts["tied"] is parts["rows"]
    assert loaded.shared["rows#0"].tolist() == [1, 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 5))
def test_what_is_written_is_what_is_held(shape: list[int], world: int) -> None:
    """The pieces of all ranks have together as many elements as the whole, and the structure is the
    same on each, whatever it holds."""
    whole, held, structures = torch.zeros(shape), 0, set()
    for rank in range(world):
        pieces: dict[str, Tensor] = {}
        _, structure = flatten({"x": piece(whole, rank, world)}, "s", pieces)
        held += sum(t.numel() for t in pieces.values())
        structures.add(json.dumps(structure))
    assert (held, len(structures)) == (whole.numel(), 1)


@pytest.mark.parametrize(("wrote", "reads"), [(1, 3), (2, 3), (3, 2), (3, 1), (8, 2)])
def test_a_reader_gets_the_rows_that_it_wants(store: FileStorage, wrote: int, reads: int) -> None:
    """Each of several readers loads its own rows only, of what was written in pieces as of what was
    whole, and together they have all."""
    save(store, 1, wrote)
    wholes = tensors(1) | {"same": torch.arange(4.0)}
    found: dict[str, list[Tensor]] = {name: [] for name in wholes}
    for rank in range(reads):
        loaded = load(store, checkpoint_name(1, 1), part=rows_of(rank, reads)).shared
        for name, parts in found.items():
            value = loaded["same"] if name == "same" else loaded["parts"][name]
            if isinstance(value, Piece):
                assert value.shape == tuple(wholes[name].shape)
                parts.extend([] if value.data is None else [value.data])
            else:
                assert reads == 1 or not value.dim() or value.shape[0] <= 1
                parts.append(value)
    for name, parts in found.items():
        whole = torch.cat(parts) if wholes[name].dim() else parts[0]
        assert torch.equal(whole.reshape(wholes[name].shape), wholes[name])


def rows_of(rank: int, world: int) -> Part:
    def wanted(_: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        chunk = -(-shape[0] // world) if shape else 0
        return (min(rank * chunk, shape[0]), min((rank + 1) * chunk, shape[0])) if shape else None

    return wanted


def test_a_damaged_row_that_nobody_wants_is_found_too(store: FileStorage) -> None:
    """A reader that wants nothing of a file still sees that it was changed."""
    save(store, 1, 3)
    path = files(store, 1)[2]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"rank-00002-of-00003\.safetensors has sha256"):
        load(store, checkpoint_name(1, 1), part=lambda *_: (0, 0))


def test_a_file_of_pieces_is_ordinary(store: FileStorage) -> None:
    """The safetensors library opens what a rank wrote, and each row is in one file."""
    save(store, 1, 2)
    found = [safetensors.torch.load_file(path) for path in files(store, 1)]
    assert found[0]["shared.parts.rows#0"].shape == (4, 5)
    assert found[1]["shared.parts.rows#4"].shape == (3, 5)
    assert "shared.parts.turned#0" not in found[0]


def test_saves_of_pieces_allocate_once(store: FileStorage) -> None:
    """The buffer of the first save serves all others."""
    ranks = checkpointers(store, 2)
    save(store, 1, 2, ranks)
    memory = [rank._staging._buffer.data_ptr() for rank in ranks]
    for step in (2, 3):
        save(store, step, 2, ranks)
    assert [rank._staging._buffer.data_ptr() for rank in ranks] == memory


def test_a_lost_file_of_pieces_is_named(store: FileStorage) -> None:
    """Without the file of one rank nothing is loaded, and the message says which it is."""
    save(store, 1, 2)
    files(store, 1)[1].unlink()
    with pytest.raises(DamagedCheckpoint, match=r"rank-00001-of-00002\.safetensors cannot be"):
        load(store, checkpoint_name(1, 1))


@pytest.mark.parametrize("byte", [40, -3])
def test_a_changed_byte_in_a_piece_is_named(store: FileStorage, byte: int) -> None:
    """A flipped bit in the header or in the rows of a piece stops the load, naming the file."""
    save(store, 1, 3)
    path = files(store, 1)[2]
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"rank-00002-of-00003\.safetensors has sha256"):
        load(store, checkpoint_name(1, 1))


def test_a_piece_that_no_rank_wrote_is_named(store: FileStorage) -> None:
    """Whole files with whole hashes, but rows 2 and 3 of a tensor in none of them: said, not made
    up."""
    for rank, saver in reversed(list(enumerate(checkpointers(store, 2)))):
        held = Piece((6, 2), torch.float32, 4 * rank, torch.ones(2, 2))
        where: dict[str, Any] = {"step": 1, "epoch": 0, "values": {}, "data_state": {}}
        saver.save(StateBundle({"w": held}), **where, blocking=rank == 0)
    with pytest.raises(DamagedCheckpoint, match=r"rows 2 to 3 of shared\.w are in none of its"):
        load(store, checkpoint_name(1, 1))


def test_rows_that_two_ranks_wrote_are_named(store: FileStorage) -> None:
    """Of two ranks that claim the same rows neither is believed."""
    for rank, saver in reversed(list(enumerate(checkpointers(store, 2)))):
        held = Piece((6, 2), torch.float32, 2 * rank, torch.ones(4, 2))
        where: dict[str, Any] = {"step": 1, "epoch": 0, "values": {}, "data_state": {}}
        saver.save(StateBundle({"w": held}), **where, blocking=rank == 0)
    with pytest.raises(DamagedCheckpoint, match=r"rows 2 to 3 of shared\.w are in two of its"):
        load(store, checkpoint_name(1, 1))


def test_a_checkpoint_of_the_first_format_still_loads(store: FileStorage) -> None:
    """What was written before there were pieces is read as it was."""
    [saver] = checkpointers(store, 1)
    state = StateBundle({"w#0": torch.ones(3)})
    saver.save(state, step=1, epoch=0, values={}, data_state={}, blocking=True)
    key = manifest.key_of(checkpoint_name(1, 1))
    content = json.loads(store.read(key)) | {"format": 1}
    del content["sha256"]
    content = {"sha256": manifest._self_hash(content), **content}
    store.write(key, json.dumps(content).encode())
    loaded = load(store, heads.read_head(store).entries[-1].name)
    assert loaded.shared["w#0"].tolist() == [1, 1, 1]


def test_a_rank_has_no_pieces_of_its_own() -> None:
    """In the state of one rank a piece would never become whole: refused at once."""
    with pytest.raises(UnsupportedState, match=r"own\.x is a piece"):
        flatten({"x": piece(torch.ones(2), 0, 1)}, "own")
