"""What the workers of a simulated gang print: the same records and text as real ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from dtp_engine.backend import LogLine
from dtp_engine.simulated import curves
from dtp_engine.simulated.gang import GangFacts, Worker
from dtp_engine.simulated.status import GIB, usage
from dtp_engine.simulated.timeline import Segment
from dtp_trainer import wire

Printed: TypeAlias = tuple[wire.Record | None, wire.Text | None]

TEXT_EVERY_S = 5
"""A rank prints a line of its own so often; records come every second."""


def lines_between(gang: GangFacts, after: Mapping[int, str], now: float) -> Iterator[LogLine]:
    """Lines after the cursors (``second/number of the line in it``), in the order of time."""
    workers = [worker for worker in gang.workers.values() if worker.up]
    done = {w.number: _position(after.get(w.number), w) for w in workers}
    first = min((second for second, _ in done.values()), default=math.floor(now))
    for second in range(first, math.ceil(now)):  # this very moment may still bring more
        for worker in workers:
            if second > worker.gone_at + 1:
                continue
            for index, (record, text) in enumerate(_printed(gang, worker, second)):
                if (second, index) > done[worker.number]:
                    yield LogLine(worker.number, f"{second}/{index}", text, record)


def _position(cursor: str | None, worker: Worker) -> tuple[int, int]:
    if cursor is None:
        return math.floor(worker.up_at) + 1, -1
    second, _, index = cursor.partition("/")
    return int(second), int(index)


def _printed(gang: GangFacts, worker: Worker, second: int) -> Iterator[Printed]:
    for event in gang.memory.events:
        if second - 1 < event.at <= second and gang.memory.tellers[event.seq] == worker.number:
            yield event, None
    yield _host(gang, worker, second), None
    segment = gang.timeline.at(second)
    if segment is not None and worker.number in segment.workers:
        window = _window(gang, segment, worker.number, second)
        if window is not None:
            yield window, None
            if second % TEXT_EVERY_S == 0:
                yield None, _text(window)
    if worker.exited and second - 1 < worker.gone_at <= second and worker.code is not None:
        yield wire.Exit(worker.gone_at, worker.number, worker.code, gang.detail), None


def _host(gang: GangFacts, worker: Worker, second: int) -> wire.Host:
    used = usage(gang, worker.number, second)
    gpus = gang.plan.spec.resources.gpus
    return wire.Host(
        at=float(second),
        worker=worker.number,
        cpu_percent=used.cpu_percent,
        memory_bytes=used.memory_bytes,
        memory_total_bytes=32 * GIB,
        gpu_percent=used.gpu_percent,
        gpu_memory_bytes=used.gpu_memory_bytes,
        gpu_memory_total_bytes=(24 * GIB,) * gpus,
    )


def _window(gang: GangFacts, segment: Segment, worker: int, second: int) -> wire.Window | None:
    """None when no step completed in this second."""
    script = gang.behaviour
    step = min(segment.step_at(second), script.steps)
    steps = step - min(segment.step_at(second - 1), script.steps)
    if steps <= 0 or not script.reports_steps:
        return None
    each = gang.plan.spec.nproc_per_node
    world = len(segment.workers) * each
    speed = curves.samples_per_s(script, world, step)
    shares = {"step": 1.0, **curves.phases(script, world, step)}
    return wire.Window(
        at=float(second),
        generation=segment.generation,
        worker=worker,
        rank=segment.workers.index(worker) * each,
        world_size=world,
        step=step,
        steps=steps,
        epoch=round(step / script.steps_per_epoch, 3),
        total_steps=script.steps,
        values=curves.values(script, step),
        samples_per_s=round(speed, 1),
        tokens_per_s=round(speed * script.tokens_per_sample) if script.tokens_per_sample else None,
        phases={name: _spread(segment.step_s * share) for name, share in shares.items()},
    )


def _spread(seconds: float) -> Mapping[str, float]:
    return {"min": seconds * 0.97, "median": seconds, "max": seconds * 1.06}


def _text(window: wire.Window) -> wire.Text:
    loss, rate = window.values["loss"], window.values["lr"]
    text = f"epoch {window.epoch:.2f} step {window.step} loss {loss:.4f} lr {rate:.2e}"
    return wire.Text(window.at, f"rank{window.rank}", "out", text)
