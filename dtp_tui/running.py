"""The life of one `dtp run`: submit, follow, say how it ended."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from datetime import UTC, datetime
from typing import Any

from dtp_engine.engine import Engine
from dtp_engine.jobs import Job, JobSpec, JobState, Reason
from dtp_engine.views import JobView
from dtp_tui import labels
from dtp_tui.attach import Detached, Face, follow
from dtp_tui.faces import JsonFace, PlainFace
from dtp_tui.output import Exit, Output, exit_code_of, note
from dtp_tui.rehearsing import is_rehearsal, warned


class Run:
    """One submission and what is shown of it."""

    def __init__(self, engine: Engine, out: Output, *, headless: bool) -> None:
        self._engine = engine
        self._out = out
        self._headless = headless
        self._job: Job | None = None

    async def whole(self, spec: JobSpec, key: str | None, *, detach: bool) -> int:
        """The exit code of `dtp run`."""
        job = self._job = await self._engine.submit(spec, key=key)
        self._submitted(job, detach=detach)
        if detach:
            return Exit.SUCCEEDED
        face = self._face()
        async with warned(self._engine, job):
            ended = await follow(self._engine, job.id, face)
        await self._result(ended.id, face.progress.values)
        return exit_code_of(ended)

    async def leave_job_alone(self, work: Awaitable[int]) -> int:
        """A signal ends this client only; the line to come back is printed."""
        try:
            return await work
        except Detached as left:
            if self._job is None:
                note("dtp: left before the job was accepted; `dtp ps` tells whether it was")
            else:
                name = self._job.name
                note(f"dtp: detached, {name} goes on; come back: dtp logs -f {name}, or dtp-tui")
            return left.exit_code

    def _face(self) -> Face:
        if self._out.json_lines:
            return JsonFace(self._out)
        if self._headless or not self._out.terminal:
            return PlainFace(self._out)
        from dtp_tui.progressbar import ProgressFace  # noqa: PLC0415 - rich costs 60 ms

        return ProgressFace(self._out)

    def _submitted(self, job: Job, *, detach: bool) -> None:
        if self._out.json_lines:
            accepted = {"id": job.id, "name": job.name, "state": job.state, "at": job.created_at}
            self._out.emit({"event": "submitted", **accepted})
            return
        workers = labels.plural(job.workers, "worker")
        self._out.say(f"{job.name} ({job.id}): submitted, {workers}")
        if detach:
            self._out.hint(f"follow it: dtp logs -f {job.name}, or dtp-tui")

    async def _result(self, job_id: str, reported: dict[str, float]) -> None:
        view = await self._engine.job(job_id)
        values = {**(view.gang.values if view.gang else {}), **reported}
        if self._out.json_lines:
            self._out.emit(result_record(view, values))
            return
        for line in summary(self._out, view, values):
            self._out.say(line)
        if is_rehearsal(view.job.spec) and view.job.reason is Reason.NO_STEPS:
            note("dtp: the script took no step of a Session, so --steps could not end it")


def result_record(view: JobView, values: Mapping[str, float]) -> dict[str, Any]:
    """The last line of `dtp run --json`."""
    job = view.job
    ended = job.ended_at or datetime.now(UTC)
    return {
        "event": "result",
        "id": job.id,
        "name": job.name,
        "state": job.state,
        "exit_code": exit_code_of(job),
        "rank_exit_code": job.exit_code,
        "reason": job.reason,
        "detail": job.detail,
        "steps": view.gang.step if view.gang else None,
        "values": dict(values),
        "attempts": job.attempt,
        "restarts": view.gang.restarts if view.gang else 0,
        "duration_s": round((ended - job.created_at).total_seconds(), 3),
        "checkpoint": view.checkpoint.name if view.checkpoint else None,
    }


def summary(out: Output, view: JobView, values: Mapping[str, float]) -> list[str]:
    """How it ended, and what to type next."""
    job, gang = view.job, view.gang
    ended = job.ended_at or datetime.now(UTC)
    took = labels.duration((ended - job.created_at).total_seconds())
    words = [f"{job.name} ({job.id}): {out.label(labels.headline(job, gang))} after {took}"]
    if gang is not None and gang.step is not None:
        words.append(f"step {labels.step(gang.step, gang.total_steps)}")
    words += [f"{name} {labels.value(value, name)}" for name, value in values.items()]
    lines = ["  ".join(words)]
    if labels.why(job):
        code = "" if job.exit_code is None else f" (exit code {job.exit_code})"
        lines.append(f"  {labels.why(job)}{code}")
    following = _next_step(job)
    return [*lines, f"  {out.paint(following, labels.Tone.QUIET)}"] if following else lines


def _next_step(job: Job) -> str:
    match job.state:
        case JobState.PAUSED:
            return f"go on: dtp resume {job.name}"
        case JobState.FAILED:
            return f"why: dtp show {job.name}; all that it wrote: dtp logs {job.name}"
        case JobState.SUCCEEDED if job.reason is Reason.NO_STEPS:
            return "did it train? a script that uses Session, or torch.distributed, is seen to"
        case _:
            return ""
