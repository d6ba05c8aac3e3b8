"""The typer program behind `dtp`: its help, and the commands under their headings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

SHORT_HELP = 66
"""Characters; a line of `dtp --help` fits 80 columns."""


class Headings(TyperGroup):
    """Lists its commands in our order, under headings."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Groups and plain commands mixed, as the table has them."""
        return [name for name in _headings(ctx) if name in self.commands]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        by_heading: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            line = self.commands[name].get_short_help_str(limit=SHORT_HELP)
            by_heading.setdefault(_headings(ctx)[name], []).append((name, line))
        for heading, rows in by_heading.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _headings(ctx: Any) -> Mapping[str, str]:
    found: Mapping[str, str] = ctx.obj
    return found


def build(headings: Mapping[str, str], names: Iterable[str]) -> typer.Typer:
    """A program of these commands; `headings` tells every command's heading, in order."""
    app = typer.Typer(
        name="dtp",
        cls=Headings,
        help="Train PyTorch jobs on several workers: pause, resume and scale them live.",
        epilog="JOB is the name of a job, or the beginning of its id.",
        no_args_is_help=True,
        suggest_commands=False,  # click does
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "obj": headings},
    )
    app.callback()(_shared)
    for name in names:
        module = import_module(f"dtp_tui.commands.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(module.command)
    return app


def _shared(
    *,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version and leave.")
    ] = False,
) -> None:
    """`--version` alone is answered before this program is built."""
    if version:
        from dtp_tui import __version__  # noqa: PLC0415 - rarely needed

        typer.echo(f"dtp {__version__}")
        raise typer.Exit
