"""Promises of tensor files: the standard format, hashed in passing, no damage unseen."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtp_trainer.checkpoints import tensorfile
from dtp_trainer.checkpoints.tensorfile import Malformed, Staging


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "größe": torch.arange(4) > 1,
    }


def written(tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    staging, file = Staging(), io.BytesIO()
    staging.take(tensors)
    size, digest = tensorfile.write(file, staging.spans, staging.data)
    assert size == len(file.getvalue())
    return file.getvalue(), digest


def test_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    """The safetensors library reads what we write, tensor by tensor."""
    tensors = some_tensors()
    data, digest = written(tensors)
    (tmp_path / "t.safetensors").write_bytes(data)
    found = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert hashlib.sha256(data).hexdigest() == digest
    assert set(found) == set(tensors)
    assert all(
        torch.equal(found[n], tensors[n]) and found[n].dtype == tensors[n].dtype for n in tensors
    )


def test_we_read_what_the_library_writes() -> None:
    """A file written by the safetensors library is read, tensor by tensor."""
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    data = safetensors.torch.save(tensors, {"format": "pt"})
    found, digest = tensorfile.read(io.BytesIO(data), len(data))
    assert digest == hashlib.sha256(data).hexdigest()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_no_tensors_make_a_file_too() -> None:
    """A share of nothing is a file that reads as nothing."""
    data, _ = written({})
    assert tensorfile.read(io.BytesIO(data), len(data))[0] == {}


DATA, DIGEST = written(some_tensors())


@settings(deadline=None)
@given(st.integers(0, 8 * len(DATA) - 1))
def test_any_flipped_bit_is_seen(bit: int) -> None:
    """Each single flipped bit changes the hash or makes the file unreadable."""
    damaged = bytearray(DATA)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        _, digest = tensorfile.read(io.BytesIO(bytes(damaged)), len(damaged))
    except Malformed:
        return
    assert digest != DIGEST


@settings(deadline=None)
@given(st.integers(0, len(DATA) - 1))
def test_any_cut_is_seen(length: int) -> None:
    """A file cut short at any byte is refused."""
    with pytest.raises(Malformed):
        tensorfile.read(io.BytesIO(DATA[:length]), len(DATA))
    with pytest.raises(Malformed):
        tensorfile.read(io.BytesIO(DATA[:length]), length)


def test_a_longer_file_is_refused() -> None:
    """Bytes after the end are damage."""
    with pytest.raises(Malformed, match="longer"):
        tensorfile.read(io.BytesIO(DATA + b"x"), len(DATA))
    with pytest.raises(Malformed, match="instead of"):
        tensorfile.read(io.BytesIO(DATA + b"x"), len(DATA) + 1)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a":{"dtype":"F32","shape":["x"],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
    ],
)
def test_nonsense_headers_are_malformed(header: bytes) -> None:
    """Headers that are no headers are refused before any memory is taken."""
    data = len(header).to_bytes(8, "little") + header + b"\0" * 4
    with pytest.raises(Malformed):
        tensorfile.read(io.BytesIO(data), len(data))


def test_staging_reuses_its_memory() -> None:
    """Tensors of the same shapes are taken into the same memory, and no earlier value shows."""
    staging = Staging()
    staging.take({"a": torch.ones(1000), "b": torch.zeros(10, dtype=torch.int64)})
    before = staging._buffer.data_ptr()
    staging.take({"a": torch.full((1000,), 3.0), "b": torch.ones(10, dtype=torch.int64)})
    assert staging._buffer.data_ptr() == before
    file = io.BytesIO()
    size, _ = tensorfile.write(file, staging.spans, staging.data)
    found, _ = tensorfile.read(io.BytesIO(file.getvalue()), size)
    assert set(found["a"].tolist()) == {3.0}
    assert set(found["b"].tolist()) == {1}


def test_taken_tensors_may_change_afterwards() -> None:
    """What is written is the state at the moment it was taken."""
    weight, staging, file = torch.ones(5), Staging(), io.BytesIO()
    staging.take({"w": weight})
    weight.zero_()
    size, _ = tensorfile.write(file, staging.spans, staging.data)
    assert tensorfile.read(io.BytesIO(file.getvalue()), size)[0]["w"].tolist() == [1.0] * 5


@settings(deadline=None)
@given(st.lists(st.integers(0, 200), max_size=30), st.integers(1, 9))
def test_shares_are_complete_and_even(sizes: list[int], world: int) -> None:
    """Each tensor has one writer; no rank writes more than the mean and one tensor."""
    tensors = {f"t{n}": torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    dealt = tensorfile.shares(tensors, world)
    assert sorted(name for names in dealt for name in names) == sorted(tensors)
    loads = [sum(tensors[name].nbytes for name in names) for names in dealt]
    assert max(loads) <= sum(sizes) / world + max(sizes, default=0)
    assert dealt == tensorfile.shares(dict(reversed(tensors.items())), world)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu_are_taken_whole() -> None:
    """Copies from a device are finished when `take` returns, into memory pinned once."""
    weight, staging, file = torch.arange(1 << 22, device="cuda"), Staging(), io.BytesIO()
    staging.take({"w": weight, "cpu": torch.ones(3)})
    weight.zero_()
    size, _ = tensorfile.write(file, staging.spans, staging.data)
    found, _ = tensorfile.read(io.BytesIO(file.getvalue()), size)
    assert torch.equal(found["w"], torch.arange(1 << 22))
    assert staging._buffer.is_pinned()
