"""`dtp run --dry-run`: what would happen, with every default filled in."""

from __future__ import annotations

import yaml

from dtp_engine.backend import Capacity
from dtp_engine.engine import Engine
from dtp_engine.jobs import JobSpec
from dtp_trainer.checkpoints.grace import too_short
from dtp_tui import labels
from dtp_tui.output import Exit, Output
from dtp_tui.records import spec_record


async def print_plan(engine: Engine, spec: JobSpec, out: Output) -> int:
    """Raises `UsageError` for a job that can never be placed here."""
    capacity = await engine.check(spec)
    fitting = workers_that_fit(spec, capacity)
    if out.json_lines:
        out.emit(
            {
                "event": "plan",
                "spec": spec_record(spec),
                "workers": spec.nodes.max,
                "workers_that_fit_now": fitting,
                "world_size": spec.nodes.max * spec.nproc_per_node,
            }
        )
        return Exit.SUCCEEDED
    _print_spec(out, spec)
    out.say()
    for line in placement_words(spec, capacity, fitting):
        out.say(line)
    if problem := await _measured(engine, spec):
        out.say(problem)
    out.say("dry run: nothing was started")
    return Exit.SUCCEEDED


async def _measured(engine: Engine, spec: JobSpec) -> str:
    """What the checkpoints of the last job of this name say about its grace."""
    earlier = [view.checkpoint for view in await engine.jobs() if view.job.name == spec.name]
    last = earlier[-1] if earlier else None
    problem = last and too_short(last, spec.stop_grace.total_seconds())
    return f"the last job of this name: {problem}" if problem else ""


def workers_that_fit(spec: JobSpec, capacity: Capacity) -> int:
    """Of those that the job may have, how many could be placed at once; 0 when too few could."""
    for workers in range(spec.nodes.max, spec.nodes.min - 1, -1):
        if capacity.fits(spec.resources, workers):
            return workers
    return 0


def placement_words(spec: JobSpec, capacity: Capacity, fitting: int) -> list[str]:
    ranks = labels.plural(spec.nproc_per_node, "rank")
    wished = labels.plural(spec.nodes.max, "worker")
    free = f"{capacity.free_cpus:g} CPUs, {capacity.free_gpus} GPUs"
    free = f"{free}, {labels.size(capacity.free_memory_bytes)} free"
    lines = [f"would start {wished} of {ranks}, world size {_world_size(spec)}; now {free}"]
    if fitting == 0:
        least = labels.plural(spec.nodes.min, "worker")
        lines.append(f"would wait in QUEUED: no room for {least} now")
    elif fitting < spec.nodes.max:
        lines.append(f"would start with {fitting}, and grow when there is room")
    return lines


def _world_size(spec: JobSpec) -> int:
    return spec.nodes.max * spec.nproc_per_node


def _print_spec(out: Output, spec: JobSpec) -> None:
    text = yaml.safe_dump(spec_record(spec), sort_keys=False, allow_unicode=True)
    for line in text.splitlines():
        out.say(line)
