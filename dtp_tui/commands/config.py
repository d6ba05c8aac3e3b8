"""`dtp config show`: the settings and where each came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from dtp_tui.commands.options import JsonOption

if TYPE_CHECKING:
    from pathlib import Path

    from dtp_engine.settings import Resolved

app = typer.Typer(
    help="Show the settings of this machine.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def group() -> None:
    """Show the settings of this machine."""


@app.command("show")
def show(*, json_lines: JsonOption = False) -> None:
    """Show every setting, its value and where it came from: environment, config file, default."""
    from dtp_engine.settings import config_path, resolve
    from dtp_tui.output import Output
    from dtp_tui.tables import Column

    settings = resolve()
    out = Output(json_lines=json_lines)
    if json_lines:
        for each in settings:
            out.emit(_record(each))
        return
    columns = [Column("SETTING"), Column("VALUE"), Column("FROM"), Column("VARIABLE", drop=1)]
    rows = [(e.setting.name, e.text, e.origin, e.setting.variable) for e in settings]
    out.table(columns, rows)
    out.hint(_about(config_path()))


def _record(each: Resolved) -> dict[str, object]:
    value = each.value if isinstance(each.value, int | float) else str(each.value)
    return {
        "setting": each.setting.name,
        "value": value,
        "from": each.origin,
        "variable": each.setting.variable,
        "help": each.setting.help,
    }


def _about(path: Path) -> str:
    return f"config file: {path}{'' if path.exists() else ' (none yet)'}"
