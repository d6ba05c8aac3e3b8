"""The job as it was submitted, field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from datetime import timedelta

from dtp_engine.jobs import Job, NodeRange
from dtp_tui import labels
from dtp_tui.labels import Tone
from dtp_tui.widgets.spans import Span
from dtp_tui.widgets.table import Column, LineTable, Row

COLUMNS = (Column("FIELD", 24), Column("VALUE", 30, grow=1))


class ConfigTable(LineTable):
    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(COLUMNS, id=id)

    def show_job(self, job: Job) -> None:
        self.show(config_rows(job))


def config_rows(job: Job) -> list[Row]:
    pairs = [
        ("id", job.id),
        ("submitted", f"{labels.moment(job.created_at)} by {job.created_by}"),
        ("workers wished", str(job.workers)),
    ]
    for field in dataclasses.fields(job.spec):
        pairs.extend(_flat(field.name, getattr(job.spec, field.name)))
    return [Row(name, (Span(name, Tone.QUIET), Span(value))) for name, value in pairs]


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """``checkpoint.every  10m``: one row for each leaf."""
    if isinstance(value, NodeRange):
        yield name, str(value)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _flat(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{name}.{key}", str(item)
    else:
        yield name, _words(name, value)


def _words(name: str, value: object) -> str:
    match value:
        case None | "" | ():
            return labels.UNKNOWN
        case timedelta():
            return labels.span(value)
        case tuple():
            return ", ".join(str(item) for item in value)
        case int() if name.endswith("_bytes"):
            return labels.size(value)
        case _:
            return str(value)
