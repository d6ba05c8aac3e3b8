"""`dtp run --nproc 1 --steps 5`: a job made small, to see whether it runs at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from dtp_engine.engine import Engine
from dtp_engine.jobs import Job, JobSpec, JobState, NodeRange
from dtp_trainer.inspection import STOP_AFTER
from dtp_tui.output import note

STEPLESS_S = 30.0
"""A script that runs for so long without a step is suspected to have none to take."""


def rehearsed(spec: JobSpec, *, nproc: int | None, steps: int | None) -> JobSpec:
    """One worker of `nproc` ranks, with no more GPUs than that; ended after `steps`."""
    if nproc is not None:
        gpus = min(spec.resources.gpus, nproc)
        spec = replace(
            spec,
            nodes=NodeRange(1, 1),
            nproc_per_node=nproc,
            resources=replace(spec.resources, gpus=gpus),
        )
    if steps is not None:
        spec = replace(spec, env={**spec.env, STOP_AFTER: str(steps)})
    return spec


def is_rehearsal(spec: JobSpec) -> bool:
    return STOP_AFTER in spec.env


@asynccontextmanager
async def warned(engine: Engine, job: Job) -> AsyncIterator[None]:
    """While a rehearsal runs: said once that its script takes no step, if it takes none."""
    if not is_rehearsal(job.spec):
        yield
        return
    watching = asyncio.create_task(_watch(engine, job))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _watch(engine: Engine, job: Job) -> None:
    await engine.wait(job.id, until=(JobState.RUNNING,))
    await asyncio.sleep(STEPLESS_S)
    view = await engine.job(job.id)
    if view.job.active and (view.gang is None or view.gang.step is None):
        note(
            f"dtp: no step after {STEPLESS_S:.0f} s; --steps ends only a script that uses Session, "
            f"any other runs on: dtp stop {job.name}"
        )
