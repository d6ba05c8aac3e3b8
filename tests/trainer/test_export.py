"""Promises of an export: the weights of a checkpoint, exactly, in a file that any library reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dtp_trainer.checkpoints import export as export_module
from dtp_trainer.checkpoints.checkpoint import Checkpointer, StateBundle
from dtp_trainer.checkpoints.contents import Tensor, tensors_of, without_tensors
from dtp_trainer.checkpoints.export import export
from dtp_trainer.checkpoints.heads import Retention
from dtp_trainer.checkpoints.manifest import DamagedCheckpoint, Manifest, read_manifest
from dtp_trainer.checkpoints.pieces import Piece
from dtp_trainer.storage import FileStorage, StorageError
from dtp_trainer.wire import checkpoint_name

NAME = checkpoint_name(1, 1)


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path / "job")


def saved(store: FileStorage, *shared: dict[str, Any]) -> Manifest:
    """By as many ranks as there are states."""
    for rank, state in reversed(list(enumerate(shared))):
        Checkpointer(
            store, generation=1, attempt=1, rank=rank, world_size=len(shared), policy=Retention()
        ).save(
            StateBundle(state, {"rank": rank, "noise": torch.ones(3)}),
            step=1,
            epoch=0.0,
            values={"loss": 0.5},
            data_state={},
            blocking=True,
        )
    return read_manifest(store, NAME)


def exported(store: FileStorage, manifest: Manifest, target: Path, root: str = "model") -> Any:
    found = tensors_of(store, manifest)
    named = {".".join(t.path[1:]): t for t in found if t.path[0] == root}
    size = export(store, manifest, named, {"step": "1"}, target)
    assert size == target.stat().st_size
    return load_file(target)


def test_every_dtype_is_exact_under_the_names_of_the_model(
    store: FileStorage, tmp_path: Path
) -> None:
    """What three ranks saved between them comes back bit for bit: bf16, tied and empty tensors,
    scalars, and those whose memory is ordered otherwise."""
    torch.manual_seed(0)
    shared = torch.randn(40, 7)
    state = {
        "layer.weight": shared,
        "tied.weight": shared,
        "half": torch.randn(33).bfloat16(),
        "turned": torch.randn(5, 6).t(),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "NaN": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    manifest = saved(store, *[{"model": state, "step": 1}] * 3)
    found = exported(store, manifest, tmp_path / "w.safetensors")
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*raw), name


def test_optimizer_states_are_found_by_their_place(store: FileStorage) -> None:
    """Tensors below lists, tuples and numbered dictionaries have paths; the rest is plain JSON."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    manifest = saved(store, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    found = {".".join(t.path): t for t in tensors_of(store, manifest)}
    assert list(found)[:2] == ["model.weight", "model.bias"]
    assert found["optimizer.state.1.exp_avg"].shape == (2,)
    assert without_tensors(manifest.state)["optimizer"]["param_groups"][0]["lr"] == 0.25


def test_pieces_are_put_together(store: FileStorage, tmp_path: Path) -> None:
    """A tensor of which every rank wrote some rows is one tensor in the export."""
    whole = torch.randn(7, 3)

    def piece(start: int, stop: int) -> dict[str, Any]:
        return {"model": {"w": Piece((7, 3), torch.float32, start, whole[start:stop])}}

    manifest = saved(store, piece(0, 4), piece(4, 4), piece(4, 7))
    assert torch.equal(exported(store, manifest, tmp_path / "w.safetensors")["w"], whole)


def test_files_larger_than_a_chunk_are_copied_whole(
    store: FileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the chunks of a file end does not matter to the tensors in it."""
    monkeypatch.setattr(export_module, "_CHUNK_BYTES", 101)
    state = {f"t{number}": torch.randn(number * 9 + 1) for number in range(12)}
    found = exported(store, saved(store, {"model": state}), tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_damaged_checkpoint_is_not_exported(store: FileStorage, tmp_path: Path) -> None:
    """One flipped bit: the file is named, and the export that was there before stays."""
    target = tmp_path / "w.safetensors"
    manifest = saved(store, {"model": {"w": torch.ones(1000)}})
    target.write_bytes(b"before")
    [file] = (store.root / "checkpoints" / NAME).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=rf"{NAME}/{file.name} has sha256"):
        exported(store, manifest, target)
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [target.name]


def test_a_target_that_cannot_be_written_is_one_line(store: FileStorage, tmp_path: Path) -> None:
    """A folder that is not there is named."""
    manifest = saved(store, {"model": {"w": torch.ones(2)}})
    found: dict[str, Tensor] = {"w": tensors_of(store, manifest)[0]}
    with pytest.raises(StorageError, match=r"cannot write .*no/w.safetensors: No such file"):
        export(store, manifest, found, {}, tmp_path / "no" / "w.safetensors")


def test_an_export_needs_no_torch() -> None:
    """A laptop without torch can look into checkpoints and export them."""
    code = (
        "import sys, dtp_trainer.checkpoints.export, dtp_engine.checkpoints; "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"False", b"False"]
