"""`dtp run FILE`: submit a job, and stay with it unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtp_tui.commands.options import JsonOption

if TYPE_CHECKING:
    from dtp_engine.jobs import JobSpec


DetachOption = Annotated[
    bool, typer.Option("--detach", "-d", help="Submit and return; the job goes on by itself.")
]
HeadlessOption = Annotated[
    bool, typer.Option("--headless", help="Plain lines instead of a progress bar.")
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Rank 0 in this terminal under a debugger; no job comes to be, nothing is kept.",
    ),
]
NprocOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="One worker with N ranks, for a try.", show_default=False
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="End well after N steps of the Session, without a last checkpoint.",
        show_default=False,
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")]
NameOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Call the job so.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set a field of the job file, such as checkpoint.every=30s; may be repeated.",
        show_default=False,
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="The same key twice is one job: the second run attaches to it.",
        show_default=False,
    ),
]


def command(  # noqa: PLR0913 - one parameter an option
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The job file; - reads it from stdin.")
    ],
    *,
    detach: DetachOption = False,
    headless: HeadlessOption = False,
    json_lines: JsonOption = False,
    debug: DebugOption = False,
    nproc: NprocOption = None,
    steps: StepsOption = None,
    dry_run: DryRunOption = False,
    name: NameOption = None,
    overrides: SetOption = None,
    idempotency_key: KeyOption = None,
) -> None:
    """Run a job and stay with it until it ends.

    Ctrl-C detaches: the job lives on, and the line to come back is printed.

    Exit codes: 0 succeeded, 1 failed, 2 usage or job file, 3 cancelled, 4 no capacity, 5 budget or
    max_duration, 6 hang, 7 infrastructure, 8 paused, 130 detached by Ctrl-C.

    With --json each line has an `event`: submitted, state, metrics, checkpoint, log, timeline, and
    at last result.
    """
    from dtp_engine.spec import read_spec

    if debug:
        _check_debuggable(file, alone=not (detach or headless or json_lines or dry_run))
    spec = read_spec(file, overrides=overrides or (), name=name)
    if nproc or steps:
        from dtp_tui.rehearsing import rehearsed

        spec = rehearsed(spec, nproc=nproc, steps=steps)
    if debug:
        from dtp_tui.debugging import debug as debug_in_terminal

        debug_in_terminal(spec)
    raise typer.Exit(
        _plan(spec, json_lines=json_lines)
        if dry_run
        else _run(spec, idempotency_key, detach=detach, headless=headless, json_lines=json_lines)
    )


def _check_debuggable(file: Path, *, alone: bool) -> None:
    """Raises `UsageError`."""
    from dtp_engine.errors import UsageError
    from dtp_tui.debugging import check_terminal

    if not alone:
        raise UsageError("--debug is for a terminal: it goes with no other way to show a job")
    if str(file) == "-":
        raise UsageError("--debug needs the terminal for the debugger: give the job file by name")
    check_terminal()


def _plan(spec: JobSpec, *, json_lines: bool) -> int:
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output
    from dtp_tui.plan import print_plan

    return with_engine(lambda engine: print_plan(engine, spec, Output(json_lines=json_lines)))


def _run(spec: JobSpec, key: str | None, *, detach: bool, headless: bool, json_lines: bool) -> int:
    from dtp_engine.engine import Engine
    from dtp_tui.attach import unless_detached
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output
    from dtp_tui.running import Run

    out = Output(json_lines=json_lines, live=True)

    async def ran(engine: Engine) -> int:
        run = Run(engine, out, headless=headless)
        return await run.leave_job_alone(unless_detached(run.whole(spec, key, detach=detach)))

    return with_engine(ran)
