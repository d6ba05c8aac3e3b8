"""`dtp run --debug`: rank 0 of a job in this terminal, under a debugger; no job comes to be."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from dtp_engine.backend import LaunchPlan
from dtp_engine.errors import UsageError
from dtp_engine.jobs import AttemptId, JobSpec
from dtp_engine.launches import Place, launch_of
from dtp_engine.local.backend import agent_environment
from dtp_trainer import wire
from dtp_tui.output import note


def check_terminal() -> None:
    """Raises `UsageError` where nobody could type into a debugger."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "--debug needs a terminal to type into; run it in one, or leave --debug away"
        )


def debug(spec: JobSpec) -> NoReturn:
    """This process becomes the keeper of the job's ranks; it exits as rank 0 does."""
    folder = Path(tempfile.mkdtemp(prefix="dtp-debug-"))
    path = folder / "launch.json"
    path.write_bytes(wire.encode_object(_launch(spec, folder)))
    ranks = f"1 of {spec.nproc_per_node} ranks" if spec.nproc_per_node > 1 else "1 rank"
    note(f"dtp: {spec.name}, {ranks} in this terminal, without gang, watchdog and checkpoints")
    env = {**agent_environment(os.environ), wire.Env.LAUNCH: str(path)}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", "dtp_trainer.foreground"], env)  # noqa: S606


def _launch(spec: JobSpec, folder: Path) -> wire.Launch:
    plan = LaunchPlan(
        attempt=AttemptId("debug", 1),
        job_name=spec.name,
        spec=spec,
        workers=(0,),
        wished=1,
        secret="",
        errors_left=0,
        hangs_left=0,
    )
    place = Place(
        worker=0,
        storage="",
        scratch=str(folder),
        host="127.0.0.1",
        zygotes="",
        zygote_idle_s=0.0,
        env={},
    )
    return launch_of(plan, place)
