"""`dtp spec`: about job files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtp_tui.commands.options import JsonOption

app = typer.Typer(
    help="Job files: schema for editors, reference, check.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a job file, for completion and checks in an editor.

    VS Code: dtp spec schema > dtp.schema.json, and as the first line of the job file
    # yaml-language-server: $schema=dtp.schema.json
    """
    import json

    from dtp_engine.spec import json_schema
    from dtp_tui.output import Output

    Output().say(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command("fields")
def fields(*, json_lines: JsonOption = False) -> None:
    """List every field of a job file with its default and what it does."""
    from dtp_engine.spec import walk
    from dtp_tui.output import Output

    out = Output(json_lines=json_lines)
    for each in walk():
        if json_lines:
            out.emit(
                {"field": each.path, "is": each.words, "default": each.default, "help": each.help}
            )
            continue
        default = f" Default: {each.default}." if each.default else ""
        out.say(f"{each.path}: {each.words}\n    {each.help}{default}")


@app.command("check")
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", show_default=False)],
) -> None:
    """Check job files; the first mistake is told with its line, and the exit code is 2."""
    from dtp_engine.spec import read_spec
    from dtp_tui.output import Output

    for file in files:
        spec = read_spec(file)
        Output().say(f"{file}: {spec.name}, good")
