"""What a checkpoint holds, for people and for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dtp_engine.checkpoints import Contents
from dtp_trainer.checkpoints.contents import Tensor
from dtp_tui import labels
from dtp_tui.output import Output
from dtp_tui.records import checkpoint_record
from dtp_tui.tables import Column


def contents_record(contents: Contents) -> dict[str, Any]:
    """All of it, as one record."""
    manifest = contents.manifest
    return {
        **checkpoint_record(contents.entry),
        "epoch": manifest.epoch,
        "data": dict(manifest.data),
        "torch": manifest.torch,
        "files": [
            {"file": s.file, "rank": s.rank, "bytes": s.bytes, "sha256": s.sha256}
            for s in manifest.shares
        ],
        "tensors": [
            {"name": _name(t), "dtype": t.dtype, "shape": list(t.shape), "bytes": t.bytes}
            for t in contents.tensors
        ],
    }


def print_contents(out: Output, contents: Contents, *, every_tensor: bool) -> None:
    _print_summary(out, contents)
    out.say()
    out.table(
        [
            Column("FILE"),
            Column("SIZE", right=True),
            Column("TENSORS", right=True, drop=2),
            Column("SHA256", drop=1),
        ],
        [
            (share.file, labels.size(share.bytes), str(len(share.tensors)), share.sha256[:16])
            for share in contents.manifest.shares
        ],
    )
    out.say()
    if every_tensor:
        _print_tensors(out, contents.tensors)
    else:
        _print_groups(out, contents.tensors)


def _print_summary(out: Output, contents: Contents) -> None:
    entry, manifest = contents.entry, contents.manifest
    checked = {True: "good", False: "corrupt", None: "not yet"}[entry.verified]
    took = f", in {entry.seconds:.2g} s" if entry.seconds is not None else ""
    facts = {
        "step": f"{manifest.step}, epoch {manifest.epoch:g}",
        "made": f"{labels.moment(_at(manifest.at))} by {labels.plural(manifest.world_size, 'rank')}"
        f" of attempt {manifest.attempt}, generation {manifest.generation}{took}",
        "torch": manifest.torch,
        "values": _pairs({n: labels.value(v, n) for n, v in manifest.values.items()}),
        "data": _pairs(manifest.data),
        "checked": f"{checked}{', pinned' if entry.pinned else ''}",
    }
    out.say(f"{manifest.name}  {labels.size(manifest.bytes)}")
    for name, fact in facts.items():
        if fact:
            out.say(f"  {name:<8} {fact}")


@dataclass(slots=True)
class _Group:
    tensors: int = 0
    numbers: int = 0
    bytes: int = 0


def _print_groups(out: Output, tensors: Sequence[Tensor]) -> None:
    """Tensors by what they belong to and how they are written."""
    groups: dict[tuple[str, str], _Group] = {}
    for tensor in tensors:
        group = groups.setdefault((tensor.path[0], tensor.dtype), _Group())
        group.tensors += 1
        group.numbers += tensor.count
        group.bytes += tensor.bytes
    columns = [Column("PART"), Column("DTYPE")]
    columns += [Column(title, right=True) for title in ("TENSORS", "NUMBERS", "SIZE")]
    rows = [
        (part, dtype, str(g.tensors), labels.count(g.numbers), labels.size(g.bytes))
        for (part, dtype), g in groups.items()
    ]
    out.table(columns, rows)


def _print_tensors(out: Output, tensors: Sequence[Tensor]) -> None:
    columns = [Column("TENSOR"), Column("DTYPE"), Column("SHAPE"), Column("SIZE", right=True)]
    rows = [
        (_name(t), t.dtype, " x ".join(map(str, t.shape)) or "scalar", labels.size(t.bytes))
        for t in tensors
    ]
    out.table(columns, rows)


def _name(tensor: Tensor) -> str:
    return ".".join(tensor.path)


def _pairs(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())


def _at(unix: float) -> datetime:
    return datetime.fromtimestamp(unix).astimezone()
