"""`setup` of a job: a shell command, once a worker, before its first ranks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque

from dtp_trainer.gang import blame
from dtp_trainer.wire import Env, Launch
from dtp_trainer.worker.lines import TAIL_LINES, Lines, pump


class SetupFailed(Exception):
    """What happened, in one line."""


async def run_setup(launch: Launch, lines: Lines) -> None:
    """
    Raises:
        SetupFailed: it ended with another code than 0, or could not be started.
    """
    if not launch.setup:
        return
    try:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", launch.setup),
            cwd=launch.workdir,
            env=_environment(launch),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise SetupFailed(f"setup could not be started in {launch.workdir}: {error}") from error
    try:
        tail = await _listen(process, lines, f"worker{launch.worker}")
    finally:
        _end(process)
    if process.returncode:
        why = blame.last_error(tail)
        code = blame.shell_code(process.returncode)
        raise SetupFailed(f"setup failed with exit code {code}" + (f": {why}" if why else ""))


async def _listen(process: asyncio.subprocess.Process, lines: Lines, source: str) -> deque[str]:
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    assert process.stdout is not None
    assert process.stderr is not None
    await asyncio.gather(
        pump(process.stdout, lines, source, "out"),
        pump(process.stderr, lines, source, "err", tail),
        process.wait(),
    )
    return tail


def _end(process: asyncio.subprocess.Process) -> None:
    """What it left in its session, and itself when this worker is to leave."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(launch: Launch) -> dict[str, str]:
    env = {**os.environ, **launch.env}
    env.pop(Env.LAUNCH, None)
    ours: dict[str, str] = {
        Env.JOB_ID: launch.job_id,
        Env.JOB_NAME: launch.job_name,
        Env.ATTEMPT: str(launch.attempt),
        Env.WORKER: str(launch.worker),
        Env.STORAGE: launch.storage,
    }
    return {**env, **ours}
