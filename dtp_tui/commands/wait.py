"""`dtp wait JOB`: until it has come to rest; the exit code says how."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated

import typer

from dtp_tui.commands.options import JobArgument, JsonOption

if TYPE_CHECKING:
    from datetime import timedelta

    from dtp_engine.engine import Engine
    from dtp_engine.jobs import Job, JobState
    from dtp_tui.output import Exit


def command(
    job: JobArgument,
    *,
    until: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATE",
            help="Stop waiting at this state, with exit code 0, such as RUNNING or PAUSED; "
            "may be given several times.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Give up after so long, such as 10m, with exit code 124; the job goes on.",
            show_default=False,
        ),
    ] = None,
    json_lines: JsonOption = False,
) -> None:
    """Wait until a job has ended or is paused.

    Exit codes: 0 succeeded, 1 failed, 3 cancelled, 4 no capacity, 5 budget or max_duration,
    6 hang, 7 infrastructure, 8 paused; 124 with --timeout, 130 after Ctrl-C.
    """
    from dtp_tui.client import with_engine

    states = [_state(word) for word in until or ()]
    limit = _limit(timeout)

    async def waited(engine: Engine) -> Exit:
        found = await engine.find(job)
        seconds = None if limit is None else limit.total_seconds()
        try:
            ended = await engine.wait(found.id, until=states, timeout_s=seconds)
        except TimeoutError:
            return await _report(engine, found.id, states, json_lines=json_lines, late=timeout)
        return await _report(engine, ended.id, states, json_lines=json_lines, late=None)

    raise typer.Exit(with_engine(waited))


def _state(word: str) -> JobState:
    from dtp_engine.errors import UsageError
    from dtp_engine.jobs import JobState

    names = [str(state) for state in JobState]
    if word.upper() in names:
        return JobState(word.upper())
    near = difflib.get_close_matches(word.upper(), names, n=1, cutoff=0.5)
    hint = f'did you mean "{near[0]}"?' if near else f"states: {', '.join(names)}"
    raise UsageError(f'--until: no state "{word}"; {hint}')


def _limit(text: str | None) -> timedelta | None:
    from dtp_engine.errors import UsageError
    from dtp_engine.quantities import parse_duration

    try:
        return None if text is None else parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from None


async def _report(
    engine: Engine, job_id: str, states: list[JobState], *, json_lines: bool, late: str | None
) -> Exit:
    from dtp_tui import labels, records
    from dtp_tui.output import Exit, Output, exit_code_of

    view = await engine.job(job_id)
    code = Exit.SUCCEEDED if _reached(view.job, states) else exit_code_of(view.job)
    code = Exit.TIMEOUT if late else code
    out = Output(json_lines=json_lines)
    if json_lines:
        out.emit({**records.job_record(view), "wait_exit_code": code})
        return code
    words = out.label(labels.headline(view.job, view.gang))
    why = labels.why(view.job)
    waited = f" after {late} of waiting" if late else ""
    out.say(f"{view.job.name} ({view.job.id}): {words}{waited}{f', {why}' if why else ''}")
    return code


def _reached(job: Job, states: list[JobState]) -> bool:
    """A job that only passed through the state counts by where it is now."""
    return job.state in states or (job.state.active and bool(states))
