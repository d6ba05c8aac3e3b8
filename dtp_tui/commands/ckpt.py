"""`dtp ckpt`: the checkpoints of a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtp_tui.commands.options import JobArgument, JsonOption

if TYPE_CHECKING:
    from dtp_engine.checkpoints import Contents, Exported
    from dtp_engine.engine import Engine
    from dtp_trainer.wire import CheckpointEntry
    from dtp_tui.output import Output
    from dtp_tui.tables import Cell

OptionalStep = Annotated[
    str | None,
    typer.Argument(metavar="[STEP]", help="Its step, or its name.", show_default=False),
]

app = typer.Typer(
    help="List, show, check, pin and export checkpoints.",
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


@app.command("show")
def show_checkpoint(
    job: JobArgument,
    checkpoint: OptionalStep = None,
    *,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json_lines: JsonOption = False,
) -> None:
    """Show what a checkpoint holds: where it stands, its files with their hashes, its tensors.

    Without STEP, the one from which the job would go on.
    """
    from dtp_engine.checkpoints import look_into
    from dtp_tui.client import with_engine
    from dtp_tui.holdings import contents_record, print_contents
    from dtp_tui.output import Output

    async def looked(engine: Engine) -> Contents:
        found = await engine.find(job)
        return await engine.storages.at_length(found.id, lambda s, _: look_into(s, checkpoint))

    contents = with_engine(looked)
    out = Output(json_lines=json_lines)
    if json_lines:
        out.emit(contents_record(contents))
    else:
        print_contents(out, contents, every_tensor=tensors)


@app.command("verify")
def verify_checkpoints(
    job: JobArgument,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[STEP|all]", help="Its step, its name, or all of them.", show_default=False
        ),
    ] = None,
    *,
    json_lines: JsonOption = False,
) -> None:
    """Read a checkpoint back and compare every hash; exits with 1 when one is not whole.

    Without STEP, the one from which the job would go on. The outcome stands in `dtp ckpt ls`.
    """
    from functools import partial

    from dtp_engine.checkpoints import check, choose, entries
    from dtp_tui.client import with_engine
    from dtp_tui.labels import Tone
    from dtp_tui.output import Exit, Output

    out = Output(json_lines=json_lines, live=True)

    async def checked(engine: Engine) -> bool:
        found = await engine.find(job)
        chosen = await engine.storages.of(
            found.id, lambda s: entries(s) if checkpoint == "all" else (choose(s, checkpoint),)
        )
        problems = 0
        for entry in chosen:
            problem = await engine.storages.at_length(found.id, partial(check, name=entry.name))
            problems += problem is not None
            if json_lines:
                out.emit({"name": entry.name, "step": entry.step, "problem": problem})
            elif problem is None:
                out.say(f"{entry.name}: {out.paint('good', Tone.GOOD)}")
            else:
                out.say(f"{entry.name}: {out.paint('bad', Tone.BAD)}: {problem}")
        return problems == 0

    if not with_engine(checked):
        raise typer.Exit(Exit.JOB_FAILED)


@app.command("export")
def export_checkpoint(
    job: JobArgument,
    words: Annotated[
        list[str],
        typer.Argument(metavar="[STEP] FILE", help="Its step or name, and a .safetensors file."),
    ],
    *,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="The optimizer's tensors, too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    json_lines: JsonOption = False,
) -> None:
    """Write the weights of a checkpoint to a safetensors file, every hash compared on the way.

    Names are those of the model's state_dict. Without STEP, the checkpoint from which the job would
    go on.
    """
    from dtp_engine.checkpoints import look_into, write_safetensors
    from dtp_tui import labels
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output

    *steps, target = words
    path = _target(steps, target, force=force)

    async def exported(engine: Engine) -> Exported:
        found = await engine.find(job)
        return await engine.storages.at_length(
            found.id,
            lambda storage, between: write_safetensors(
                storage,
                found.name,
                look_into(storage, steps[0] if steps else None),
                path,
                between,
                with_optimizer=with_optimizer,
            ),
        )

    done = with_engine(exported)
    out = Output(json_lines=json_lines)
    if json_lines:
        out.emit(
            {"name": done.entry.name, "step": done.entry.step, "file": str(path)}
            | {"bytes": done.bytes, "tensors": done.tensors}
        )
    else:
        what = f"{labels.plural(done.tensors, 'tensor')}, {labels.size(done.bytes)}"
        out.say(f"{path}: {what} from {done.entry.name}")


def _target(steps: list[str], target: str, *, force: bool) -> Path:
    """Where the export goes. Raises `UsageError`."""
    from dtp_engine.errors import UsageError

    path = Path(target)
    if len(steps) > 1 or path.suffix != ".safetensors":
        raise UsageError(
            f"{target}: name a file that ends in .safetensors: dtp ckpt export JOB [STEP] FILE"
        )
    if path.exists() and not force:
        raise UsageError(f"{path} exists; choose another name, or add --force")
    return path


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
