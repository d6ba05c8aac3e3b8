"""Promises of nested state as named tensors and JSON: what goes in comes out, exactly."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dtp_trainer.checkpoints.tree import UnsupportedState, flatten, unflatten


def round_trip(tree: Any) -> Any:
    tensors, structure = flatten(tree, "state")
    return unflatten(json.loads(json.dumps(structure, allow_nan=False)), tensors)


def same(a: Any, b: Any) -> bool:
    """Equal in type, order, value and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, (np.ndarray, np.generic)):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return math.isnan(a) == math.isnan(b) and (math.isnan(a) or a.hex() == b.hex())
    return bool(a == b)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.builds(np.float32, st.floats(width=32)),
)
some_tensors = st.one_of(
    st.builds(torch.tensor, st.floats(width=32)),
    st.builds(torch.tensor, st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)),
    st.builds(lambda n: torch.arange(n).to(torch.bfloat16), st.integers(0, 4)),
    st.builds(lambda n: torch.arange(6 * n).reshape(2, n, 3).mT, st.integers(0, 3)),
    st.builds(lambda n: np.arange(n, dtype=np.uint32), st.integers(0, 4)),
)
keys = st.one_of(st.integers(), st.text(max_size=4), st.just("~tensor"), st.booleans())
trees = st.recursive(
    plain | some_tensors,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(trees)
def test_any_state_comes_back_exactly(tree: Any) -> None:
    """Nested state of any shape comes back with its types, order, values and bits."""
    assert same(round_trip(tree), tree)


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "complex64",
        "complex128",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    ],
)
def test_every_dtype_comes_back(dtype: str) -> None:
    """Tensors of every usual dtype come back, those with no element and no dimension too."""
    kind = getattr(torch, dtype)
    tree = [torch.ones(2, 3).to(kind), torch.zeros((), dtype=kind), torch.zeros(0, 2, dtype=kind)]
    assert same(round_trip(tree), tree)


def test_odd_containers_come_back() -> None:
    """Containers and values that schedulers and generators keep come back in kind."""
    tree = {
        "milestones": Counter({3: 1, 7: 2}),
        "size": torch.Size([1, 2]),
        "set": {1, "a"},
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "big-endian": np.arange(3, dtype=np.int16),
        "numpy": np.random.RandomState(1).get_state(),
        "inf": [math.inf, -math.inf, -0.0],
    }
    assert same(round_trip(tree), tree)


def test_optimizers_and_schedulers_come_back() -> None:
    """State of real optimizers and schedulers goes into fresh ones."""
    for make in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop):
        model = nn.Linear(3, 2)
        optimizer = make(model.parameters(), lr=0.1)
        schedulers = [
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5]),
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        ]
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        state = {"optimizer": optimizer.state_dict(), "s": [s.state_dict() for s in schedulers]}
        back = round_trip(state)
        assert same(back, state)
        fresh = make(model.parameters(), lr=0.5)
        fresh.load_state_dict(back["optimizer"])
        assert same(fresh.state_dict(), state["optimizer"])


def test_module_metadata_comes_back() -> None:
    """The versions that `load_state_dict` reads travel with a module's state."""
    state = nn.BatchNorm1d(2).state_dict()
    back = round_trip(state)
    assert back._metadata == state._metadata  # type: ignore[attr-defined]


def test_tied_tensors_are_kept_once_and_stay_tied() -> None:
    """One tensor at several places has one name, and is one tensor afterwards."""
    weight = nn.Parameter(torch.randn(3, 4))
    tree = {"embed": weight, "head": weight.data, "turned": weight.data.T, "row": weight.data[0]}
    tensors, structure = flatten(tree, "m")
    assert sorted(tensors) == ["m.embed", "m.row", "m.turned"]
    back = unflatten(structure, tensors)
    assert back["embed"] is back["head"]
    assert torch.equal(back["turned"], weight.T)


def test_memory_layout_comes_back() -> None:
    """Tensors whose dimensions lie in another order in memory come back in that order."""
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    back = round_trip({"image": image, "half": torch.arange(10)[::2]})
    assert back["image"].stride() == image.stride()
    assert torch.equal(back["image"], image)
    assert back["half"].tolist() == [0, 2, 4, 6, 8]


def test_names_that_collide_stay_apart() -> None:
    """Paths that read the same keep their own tensors."""
    tree = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: {"1": torch.tensor(3)}}
    assert same(round_trip(tree), tree)


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Colour.RED, r"state\.groups\.0\.x is a .*Colour"),
        (object(), "is a builtins.object"),
        (np.array(["a"]), "numpy array of <U1"),
        (torch.eye(2).to_sparse(), "plain dense tensors only"),
        (torch.empty(2, device="meta"), "plain dense tensors only"),
    ],
)
def test_what_cannot_be_kept_is_named_by_its_path(value: Any, said: str) -> None:
    """A value that no checkpoint can hold is refused, naming where it is."""
    with pytest.raises(UnsupportedState, match=said):
        flatten({"groups": [{"x": value}]}, "state")
