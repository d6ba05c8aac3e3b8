"""`dtp logs JOB`: what the ranks wrote, merged."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from dtp_tui.commands.options import FollowOption, JobArgument, JsonOption

if TYPE_CHECKING:
    from dtp_engine.engine import Engine
    from dtp_trainer.wire import Text
    from dtp_tui.output import Output


@dataclass(frozen=True, slots=True)
class Filter:
    """Which lines are wanted."""

    ranks: frozenset[str]
    """Sources such as ``rank0``; empty for all."""
    since: float
    """Unix time."""
    pattern: re.Pattern[str] | None

    def __call__(self, text: Text) -> bool:
        return (
            text.at >= self.since
            and (not self.ranks or text.source in self.ranks)
            and (self.pattern is None or self.pattern.search(text.text) is not None)
        )


def command(
    job: JobArgument,
    *,
    follow: FollowOption = False,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="RANKS", help="Only of these ranks, such as 0 or 0,3.", show_default=False
        ),
    ] = None,
    attempt: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only of this attempt.", show_default=False),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="Only of the last while, such as 5m.", show_default=False
        ),
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN", help="Only lines that match this expression.", show_default=False
        ),
    ] = None,
    json_lines: JsonOption = False,
) -> None:
    """Print what the ranks wrote, merged by time.

    Of all attempts, unless told otherwise. --follow goes on through restarts and resumes and ends
    with the job, with its exit code; Ctrl-C leaves the job alone.
    """
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output

    wanted = Filter(_ranks(rank), _since(since), _pattern(grep))

    async def show(engine: Engine) -> int:
        found = await engine.find(job)
        await _check_attempt(engine, found.id, attempt)
        show_line = _printer(Output(json_lines=json_lines, live=follow), wanted)
        await _print_lines(engine, found.id, attempt, show_line, follow=follow)
        return await _exit_code(engine, found.id) if follow else 0

    raise typer.Exit(with_engine(show))


def _ranks(text: str | None) -> frozenset[str]:
    from dtp_engine.errors import UsageError

    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and (not parts or not all(part.isdigit() for part in parts)):
        raise UsageError(f'--rank: expected numbers such as 0 or 0,3, found "{text}"')
    return frozenset(f"rank{int(part)}" for part in parts)


def _since(text: str | None) -> float:
    from dtp_engine.errors import UsageError
    from dtp_engine.quantities import parse_duration

    try:
        return 0.0 if text is None else time.time() - parse_duration(text).total_seconds()
    except ValueError as error:
        raise UsageError(f"--since: {error}") from None


def _pattern(text: str | None) -> re.Pattern[str] | None:
    from dtp_engine.errors import UsageError

    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise UsageError(f'--grep: "{text}" is not an expression: {error}') from None


async def _check_attempt(engine: Engine, job_id: str, attempt: int | None) -> None:
    from dtp_engine.errors import UsageError

    numbers = [one.number for one in await engine.attempts(job_id)]
    if attempt is not None and attempt not in numbers:
        there = f"1 to {numbers[-1]}" if numbers else "none yet"
        raise UsageError(f"--attempt: no attempt {attempt}; there are: {there}")


Show = Callable[[int, int, "Text"], None]
"""(attempt, worker, line)."""


def _printer(out: Output, wanted: Filter) -> Show:
    from dtp_tui.lines import text_line
    from dtp_tui.records import text_record

    def show(attempt: int, worker: int, text: Text) -> None:
        if not wanted(text):
            return
        if out.json_lines:
            out.emit(text_record(attempt, worker, text))
        else:
            out.say(text_line(out, text))

    return show


async def _print_lines(
    engine: Engine, job_id: str, attempt: int | None, show: Show, *, follow: bool
) -> None:
    async for number, line in engine.logs(job_id, attempt=attempt, follow=follow):
        if line.text is not None:
            show(number, line.worker, line.text)


async def _exit_code(engine: Engine, job_id: str) -> int:
    from dtp_tui.output import exit_code_of

    return exit_code_of((await engine.job(job_id)).job)
