"""`dtp profile JOB`: what the ranks of a running job do, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtp_tui.commands.options import JobArgument, JsonOption

if TYPE_CHECKING:
    from dtp_engine.engine import Engine


def command(
    job: JobArgument,
    *,
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="How many steps to record.")
    ] = 5,
    rank: Annotated[
        str, typer.Option(metavar="RANKS", help="Of these ranks, such as 0 or 0,3, or all.")
    ] = "0",
    memory: Annotated[
        bool, typer.Option("--memory", help="Also who holds memory; on a GPU its history.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A file, or a folder for several; else the current one.",
            show_default=False,
        ),
    ] = None,
    wait: Annotated[
        str, typer.Option(metavar="DURATION", help="Give up when it takes longer.")
    ] = "2m",
    json_lines: JsonOption = False,
) -> None:
    """Record the next steps of a running job with torch's profiler.

    Nothing restarts and nothing stops. The trace is kept with the job and copied here; it opens in
    https://ui.perfetto.dev. Only scripts that use Session can be recorded.
    """
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output
    from dtp_tui.profiling import Recording, Wanted

    wanted = Wanted.of(steps=steps, ranks=rank, memory=memory, wait=wait, out=out)

    async def recorded(engine: Engine) -> None:
        found = await engine.find(job)
        await Recording(engine, found, wanted, Output(json_lines=json_lines)).whole()

    with_engine(recorded)
