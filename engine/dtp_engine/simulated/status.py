"""What a simulated gang writes of itself: the same object as a real one's ``gang.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from dtp_engine.simulated import curves
from dtp_engine.simulated.gang import GangFacts
from dtp_trainer import wire
from dtp_trainer.wire import GangPhase

_TREND = 16
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one worker, at one second."""

    cpu_percent: float
    memory_bytes: int
    gpu_percent: tuple[float, ...]
    gpu_memory_bytes: tuple[int, ...]


def status_of(gang: GangFacts, at: float) -> wire.Gang | None:
    """None before its first leader."""
    if gang.leader is None:
        return None
    status = wire.Gang(
        attempt=gang.plan.attempt.number,
        term=gang.term,
        leader=gang.leader,
        address=f"{gang.workers[gang.leader].host}:29400",
        phase=gang.phase,
        generation=gang.memory.generation,
        updated=gang.updated,
        members=_members(gang, at),
        world_size=gang.world_size,
        restarts=gang.restarts,
        errors_used=gang.errors_used,
        hangs_used=gang.hangs_used,
        outcome=gang.outcome,
        detail=gang.detail,
        events=tuple(gang.memory.events),
    )
    last = gang.timeline.last
    if last is None or not gang.behaviour.reports_steps:
        return status
    return _with_progress(status, gang, min(at, last.end, last.stuck_at))


def _with_progress(status: wire.Gang, gang: GangFacts, last_step_at: float) -> wire.Gang:
    script, world = gang.behaviour, gang.world_size
    step = gang.step_at(last_step_at)
    speed = curves.samples_per_s(script, world, step)
    trend = [curves.samples_per_s(script, world, max(step - n, 0)) for n in range(_TREND)]
    running = gang.phase in (GangPhase.RUNNING, GangPhase.DRAINING)
    tokens = script.tokens_per_sample
    return replace(
        status,
        step=step,
        total_steps=script.steps,
        epoch=round(step / script.steps_per_epoch, 3),
        last_step_at=last_step_at,
        values=curves.values(script, step),
        samples_per_s=round(speed, 1) if running else None,
        tokens_per_s=round(speed * tokens, 1) if running and tokens else None,
        trend=tuple(round(value, 1) for value in reversed(trend)),
        data_wait=round(curves.data_wait(script, step), 4),
        step_s=round(curves.seconds_a_step(script, world), 6),
        phases={n: round(share, 4) for n, share in curves.phases(script, world, step).items()},
        verdict="compute",
    )


def _members(gang: GangFacts, at: float) -> tuple[wire.Member, ...]:
    current = gang.timeline.current
    ranked = current.workers if current else ()
    each = gang.plan.spec.nproc_per_node
    return tuple(
        wire.Member(
            worker=worker.number,
            host=worker.host,
            nproc_per_node=each,
            first_rank=ranked.index(worker.number) * each if worker.number in ranked else None,
            leaving=worker.asked_at is not None,
            **asdict(usage(gang, worker.number, at)),
        )
        for worker in sorted(gang.members, key=lambda worker: worker.number)
    )


def usage(gang: GangFacts, worker: int, at: float) -> Usage:
    """CPU, memory and GPUs of a worker, at this second."""
    need, second = gang.plan.spec.resources, int(at)
    busy = gang.timeline.at(at) is not None
    jitter = curves.noise(worker * 7919, second)
    cpu = need.cpus * (88 + 8 * jitter if busy else 4 + 2 * jitter)
    gpu = tuple(
        round(91 + 6 * curves.noise(worker * 31 + n, second), 1) if busy else 0.0
        for n in range(need.gpus)
    )
    return Usage(
        round(cpu, 1),
        int((1.4 + 0.05 * jitter) * GIB),
        gpu,
        tuple(int(17.2 * GIB) if busy else GIB for _ in gpu),
    )
