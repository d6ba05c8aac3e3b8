"""Nested state ⇄ named tensors and plain JSON, exactly and without pickle.

Plain values (None, bool, int, finite float, str) and lists stand for themselves in the JSON, as do
dictionaries with ordinary text keys. Everything else is an object with one key that begins with
``~``: ``{"~tensor": "shared.model.weight"}``, ``{"~tuple": [...]}``.

Of a tensor that ranks hold in pieces, the JSON has the shape of the whole, so it is the same on all
ranks: ``{"~pieces": "shared.model.weight", "shape": [8, 4], "dtype": "F32"}``.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from dtp_trainer.checkpoints.pieces import Piece, Whole, is_piece_name, piece_name
from dtp_trainer.checkpoints.tensorfile import dtype_called, dtype_name, supported

Json: TypeAlias = Any
Tensors: TypeAlias = dict[str, torch.Tensor]

_MARK = "~"


class UnsupportedState(TypeError):
    """The state holds something that no checkpoint can hold; the message names its path."""


def flatten(tree: Any, root: str, pieces: Tensors | None = None) -> tuple[Tensors, Json]:
    """The tensors of `tree` by name, each name beginning with `root`, and the JSON of the rest.

    Tensors are taken by reference and detached. One that occurs several times (tied weights) has
    one name. Numpy arrays come as tensors that share their memory. What this rank holds of a
    `Piece` is added to `pieces` by its name in a file; without `pieces` there may be none.

    Raises:
        UnsupportedState: naming the path of the value.
    """
    flat = _Flattening(pieces)
    structure = _encode(tree, root, flat)
    return flat.tensors, structure


def unflatten(structure: Json, tensors: Mapping[str, torch.Tensor | Piece]) -> Any:
    """The tree of which `flatten` made `structure` and `tensors`; a `Piece` stays one.

    Raises:
        ValueError, KeyError, TypeError: `structure` is not one, or a tensor is missing.
    """
    return _decode(structure, _Unflattening(tensors))


# ---------------------------------------------------------------------------------------- tensors


@dataclass(slots=True)
class _Flattening:
    pieces: Tensors | None
    tensors: Tensors = field(default_factory=dict)
    names: dict[tuple[Any, ...], str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def name(self, tensor: torch.Tensor, path: str) -> str:
        if tensor.numel() == 0:
            return self._new(tensor, path)
        view = (
            tensor.data_ptr(),
            tensor.dtype,
            tensor.device,
            tuple(tensor.shape),
            tensor.stride(),
        )
        if view not in self.names:
            self.names[view] = self._new(tensor, path)
        return self.names[view]

    def name_of_piece(self, piece: Piece, path: str) -> str:
        view = (id(piece),)
        if view not in self.names:
            name = self.names[view] = self._free(path)
            if self.pieces is not None and piece.data is not None and piece.data.numel():
                self.pieces[piece_name(name, piece.start)] = piece.data.detach()
        return self.names[view]

    def _new(self, tensor: torch.Tensor, path: str) -> str:
        # No tensor is mistaken for a piece of another one.
        name = self._free(f"{path}~" if is_piece_name(path) else path)
        self.tensors[name] = tensor
        return name

    def _free(self, path: str) -> str:
        name, number = path, 2
        while name in self.taken:
            name, number = f"{path}~{number}", number + 1
        self.taken.add(name)
        return name


@dataclass(slots=True)
class _Unflattening:
    tensors: Mapping[str, torch.Tensor | Piece]
    strided: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensor(self, name: str, value: Mapping[str, Json]) -> torch.Tensor | Piece:
        source = self.tensors[name]
        if "stride" not in value or isinstance(source, Piece):
            return source
        if name not in self.strided:
            self.strided[name] = torch.empty_strided(
                source.shape, value["stride"], dtype=source.dtype
            ).copy_(source)
        return self.strided[name]


def _encode_tensor(tensor: torch.Tensor, path: str, flat: _Flattening) -> Json:
    tensor = tensor.detach()
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.is_meta or tensor.is_neg() or tensor.is_conj():
        raise UnsupportedState(
            f"{path} is a {type(tensor).__name__} ({tensor.layout}, {tensor.device}): a checkpoint "
            "holds plain dense tensors only; convert it first"
        )
    if tensor.dtype is torch.complex128:  # the one common dtype that safetensors does not know
        return {"~complex": _encode_tensor(torch.view_as_real(tensor), path, flat)}
    if not supported(tensor.dtype):
        raise UnsupportedState(f"{path} is a tensor of {tensor.dtype}, which safetensors has not")
    encoded: dict[str, Json] = {"~tensor": flat.name(tensor, path)}
    if not tensor.is_contiguous() and _is_dense(tensor):
        encoded["stride"] = list(tensor.stride())
    return encoded


def _encode_piece(piece: Piece, path: str, flat: _Flattening) -> Json:
    if flat.pieces is None:
        raise UnsupportedState(f"{path} is a piece of a tensor, but other ranks have none of it")
    if not supported(piece.dtype):
        raise UnsupportedState(f"{path} is a tensor of {piece.dtype}, which safetensors has not")
    encoded: dict[str, Json] = {
        "~pieces": flat.name_of_piece(piece, path),
        "shape": list(piece.shape),
        "dtype": dtype_name(piece.dtype),
    }
    if piece.stride is not None:
        encoded["stride"] = list(piece.stride)
    return encoded


def pieces_in(structure: Json) -> dict[str, Whole]:
    """The tensors that a structure has in pieces, by name."""
    return {
        found["~pieces"]: Whole(tuple(found["shape"]), dtype_called(found["dtype"]))
        for found in _pieces(structure)
    }


def _pieces(structure: Json) -> Iterator[Mapping[str, Json]]:
    if isinstance(structure, dict):
        if "~pieces" in structure:
            yield structure
        structure = list(structure.values())
    if isinstance(structure, list):
        for item in structure:
            yield from _pieces(item)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Its elements fill their memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


# ------------------------------------------------------------------------------- everything else


def _encode(value: Any, path: str, flat: _Flattening) -> Json:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"~float": repr(value)}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, path, flat)
    if kind is list:
        return _encode_items(value, path, flat)
    if kind is dict and all(type(k) is str and not k.startswith(_MARK) for k in value):
        return {key: _encode(item, f"{path}.{key}", flat) for key, item in value.items()}
    encode = _ENCODERS.get(kind)
    if encode is None and isinstance(value, np.generic):
        encode = _encode_numpy_scalar
    if encode is None:
        raise UnsupportedState(
            f"{path} is a {kind.__module__}.{kind.__qualname__}: a checkpoint holds tensors, numpy "
            "arrays, numbers, text, lists, tuples, sets and dictionaries; convert it first"
        )
    return encode(value, path, flat)


def _encode_items(items: Iterable[Any], path: str, flat: _Flattening) -> list[Json]:
    return [_encode(item, f"{path}.{number}", flat) for number, item in enumerate(items)]


def _encode_pairs(pairs: Mapping[Any, Any], path: str, flat: _Flattening) -> list[Json]:
    return [
        [_encode(key, f"{path} (a key)", flat), _encode(item, f"{path}.{key}", flat)]
        for key, item in pairs.items()
    ]


def _encode_ordered(value: OrderedDict[Any, Any], path: str, flat: _Flattening) -> Json:
    encoded = {"~ordered": _encode_pairs(value, path, flat)}
    # Versions of the modules, which `Module.load_state_dict` reads.
    metadata = getattr(value, "_metadata", None)
    if metadata is not None:
        encoded["metadata"] = _encode(metadata, f"{path} (metadata)", flat)
    return encoded


def _encode_array(value: np.ndarray[Any, Any], path: str, flat: _Flattening) -> Json:
    try:
        tensor = torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError):
        raise UnsupportedState(
            f"{path} is a numpy array of {value.dtype}: a checkpoint holds arrays of numbers only"
        ) from None
    return {"~array": _encode_tensor(tensor, path, flat), "dtype": value.dtype.str}


def _encode_numpy_scalar(value: np.generic, path: str, flat: _Flattening) -> Json:
    return {"~scalar": _encode_array(np.asarray(value), path, flat)}


_Encoder: TypeAlias = Callable[[Any, str, _Flattening], Json]
_ENCODERS: dict[type, _Encoder] = {
    tuple: lambda v, path, flat: {"~tuple": _encode_items(v, path, flat)},
    torch.Size: lambda v, _path, _flat: {"~size": list(v)},
    set: lambda v, path, flat: {"~set": _encode_items(sorted(v, key=repr), path, flat)},
    dict: lambda v, path, flat: {"~dict": _encode_pairs(v, path, flat)},
    Counter: lambda v, path, flat: {"~counter": _encode_pairs(v, path, flat)},
    OrderedDict: _encode_ordered,
    bytes: lambda v, _path, _flat: {"~bytes": base64.b64encode(v).decode()},
    Piece: _encode_piece,
    torch.dtype: lambda v, _path, _flat: {"~dtype": str(v).removeprefix("torch.")},
    torch.device: lambda v, _path, _flat: {"~device": str(v)},
    np.ndarray: _encode_array,
}


def _decode(value: Json, flat: _Unflattening) -> Any:
    if isinstance(value, list):
        return [_decode(item, flat) for item in value]
    if not isinstance(value, dict):
        return value
    first = next(iter(value), "")
    if first.startswith(_MARK):
        return _DECODERS[first](value[first], value, flat)
    return {key: _decode(item, flat) for key, item in value.items()}


def _decode_pairs(pairs: Json, flat: _Unflattening) -> list[tuple[Any, Any]]:
    return [(_decode(key, flat), _decode(item, flat)) for key, item in pairs]


def _decode_ordered(pairs: Json, whole: Json, flat: _Unflattening) -> OrderedDict[Any, Any]:
    ordered = OrderedDict(_decode_pairs(pairs, flat))
    if "metadata" in whole:
        ordered._metadata = _decode(whole["metadata"], flat)  # type: ignore[attr-defined]  # noqa: SLF001
    return ordered


def _decode_array(tensor: Json, whole: Json, flat: _Unflattening) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = _decode(tensor, flat).numpy().astype(whole["dtype"])
    return array


def _decode_dtype(name: str, _whole: Json, _flat: _Unflattening) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


_DECODERS: dict[str, Callable[[Json, Json, _Unflattening], Any]] = {
    "~tensor": lambda name, whole, flat: flat.tensor(name, whole),
    "~pieces": lambda name, whole, flat: flat.tensor(name, whole),
    "~complex": lambda v, _whole, flat: torch.view_as_complex(_decode(v, flat)),
    "~float": lambda text, _whole, _flat: float(text),
    "~tuple": lambda items, _whole, flat: tuple(_decode(items, flat)),
    "~size": lambda sizes, _whole, _flat: torch.Size(sizes),
    "~set": lambda items, _whole, flat: set(_decode(items, flat)),
    "~dict": lambda pairs, _whole, flat: dict(_decode_pairs(pairs, flat)),
    "~counter": lambda pairs, _whole, flat: Counter(dict(_decode_pairs(pairs, flat))),
    "~ordered": _decode_ordered,
    "~bytes": lambda text, _whole, _flat: base64.b64decode(text),
    "~dtype": _decode_dtype,
    "~device": lambda text, _whole, _flat: torch.device(text),
    "~array": _decode_array,
    "~scalar": lambda v, _whole, flat: _decode(v, flat)[()],
}
