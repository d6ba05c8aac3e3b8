"""`dtp controller`: the background process that acts on requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from dtp_tui.commands.options import JsonOption

if TYPE_CHECKING:
    from dtp_engine.driver import Driver
    from dtp_engine.engine import Engine

app = typer.Typer(
    help="The background process that acts; it starts by itself.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("status")
def status(*, json_lines: JsonOption = False) -> None:
    """Say who drives the jobs of this state folder, and where its log is."""
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output

    driver = with_engine(_driver)
    out = Output(json_lines=json_lines)
    if json_lines:
        out.emit(_record(driver))
    else:
        out.say(_words(driver))


@app.command("run")
def run() -> None:
    """Drive jobs in the foreground, for a service or to watch its log; Ctrl-C leaves.

    Refused while another controller is alive. Jobs train on without any.
    """
    from dtp_engine import controller
    from dtp_engine.errors import Refused
    from dtp_tui.client import with_engine

    driver = with_engine(_driver)
    if driver.alive:
        raise Refused(f"{driver.holder} drives already; ask it to leave: dtp controller stop")
    raise typer.Exit(controller.main())


@app.command("stop")
def stop(*, json_lines: JsonOption = False) -> None:
    """Ask the background controller to leave. Jobs train on; the next command starts another."""
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output

    async def stopped(engine: Engine) -> bool:
        return await engine.stop_driver()

    found = with_engine(stopped)
    out = Output(json_lines=json_lines)
    if json_lines:
        out.emit({"stopped": found})
    else:
        out.say("asked to leave; jobs train on" if found else "no controller was running")


async def _driver(engine: Engine) -> Driver:
    return await engine.driver()


def _record(driver: Driver) -> dict[str, object]:
    return {
        "alive": driver.alive,
        "silent": driver.silent,
        "holder": driver.holder,
        "beat_at": driver.beat_at,
        "log": str(driver.log),
    }


def _words(driver: Driver) -> str:
    from datetime import UTC, datetime

    from dtp_tui.labels import age

    if driver.silent:
        silence = age(driver.beat_at, datetime.now(UTC))
        return f"silent for {silence}: {driver.holder}; the next command starts another"
    if not driver.alive:
        return f"no controller is running; the next command that needs one starts it ({driver.log})"
    beat = age(driver.beat_at, datetime.now(UTC))
    return f"alive: {driver.holder}, last beat {beat} ago, log {driver.log}"
