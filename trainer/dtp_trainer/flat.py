"""Flat frozen dataclasses to plain dicts and back: what JSON holds of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar


class FlatRecord:
    """Encode and decode of a flat frozen dataclass; unknown keys are ignored so that old readers
    survive new writers."""

    nested: ClassVar[Mapping[str, type[FlatRecord]]] = {}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Any:
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values = {key: value for key, value in data.items() if key in known}
        for name, kind in cls.nested.items():
            found = values.get(name)
            if isinstance(found, list):
                values[name] = tuple(kind.from_dict(item) for item in found)
            elif isinstance(found, Mapping):
                values[name] = kind.from_dict(found)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
