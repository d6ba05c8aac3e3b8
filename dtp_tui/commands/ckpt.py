"""`dtp ckpt`: the checkpoints of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dtp_tui.commands.options import JobArgument, JsonOption

if TYPE_CHECKING:
    from dtp_engine.engine import Engine
    from dtp_trainer.wire import CheckpointEntry
    from dtp_tui.output import Output
    from dtp_tui.tables import Cell

app = typer.Typer(
    help="List checkpoints, or pin one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("ls")
def list_checkpoints(job: JobArgument, *, json_lines: JsonOption = False) -> None:
    """List the checkpoints of a job, oldest first."""
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output
    from dtp_tui.records import checkpoint_record

    async def listed(engine: Engine) -> Sequence[CheckpointEntry]:
        return await engine.checkpoints((await engine.find(job)).id)

    entries = with_engine(listed)
    out = Output(json_lines=json_lines)
    if json_lines:
        for entry in entries:
            out.emit(checkpoint_record(entry))
    elif entries:
        print_checkpoints(out, entries)
    else:
        out.say(f"{job}: no checkpoint yet")


@app.command("pin")
def pin_checkpoint(
    job: JobArgument,
    checkpoint: Annotated[str, typer.Argument(metavar="STEP", help="Its step, or its name.")],
    *,
    unpin: Annotated[bool, typer.Option("--unpin", help="Give it back to retention.")] = False,
    json_lines: JsonOption = False,
) -> None:
    """Pin a checkpoint: it is kept, whatever `checkpoint.keep` says."""
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output
    from dtp_tui.records import checkpoint_record

    async def pinned(engine: Engine) -> CheckpointEntry:
        found = await engine.find(job)
        return await engine.pin(found.id, checkpoint, pinned=not unpin)

    entry = with_engine(pinned)
    out = Output(json_lines=json_lines)
    if json_lines:
        out.emit(checkpoint_record(entry))
    else:
        out.say(f"{entry.name}: {'pinned' if entry.pinned else 'no longer pinned'}")


def print_checkpoints(out: Output, entries: Sequence[CheckpointEntry]) -> None:
    from datetime import UTC, datetime

    from dtp_tui import labels
    from dtp_tui.tables import Column

    now = datetime.now(UTC)
    columns = [
        Column("STEP", right=True),
        Column("NAME", drop=2),
        Column("SIZE", right=True),
        Column("AGE", right=True),
        Column("ATTEMPT", right=True, drop=3),
        Column("CHECKED"),
        Column("VALUES", drop=1),
    ]
    rows = [
        (
            str(entry.step),
            entry.name,
            labels.size(entry.bytes),
            labels.age(entry.at, now),
            str(entry.attempt),
            _checked(entry),
            _values(entry),
        )
        for entry in entries
    ]
    out.table(columns, rows)


def _values(entry: CheckpointEntry) -> str:
    """The most telling ones; --json has all."""
    from dtp_tui import labels
    from dtp_tui.training import SHOWN_FIRST

    names = [name for name in SHOWN_FIRST if name in entry.values] or list(entry.values)[:2]
    return "  ".join(f"{name} {labels.value(entry.values[name], name)}" for name in names)


def _checked(entry: CheckpointEntry) -> Cell:
    from dtp_tui.labels import Tone
    from dtp_tui.tables import Cell

    pinned = " pinned" if entry.pinned else ""
    if entry.verified is None:
        return Cell(f"not yet{pinned}", Tone.QUIET)
    good = entry.verified
    return Cell(f"{'good' if good else 'corrupt'}{pinned}", Tone.GOOD if good else Tone.BAD)
