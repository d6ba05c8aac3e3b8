"""The simulated cluster: believable, deterministic, and as bad as asked."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dtp_engine.backend import CapacityRequest, LaunchPlan, Liveness, LogLine, Machine
from dtp_engine.clock import VirtualClock
from dtp_engine.demo import Demo
from dtp_engine.errors import Unreachable
from dtp_engine.jobs import (
    AttemptId,
    CheckpointPolicy,
    JobSpec,
    JobState,
    NodeRange,
    Reason,
    Resources,
    Watchdog,
)
from dtp_engine.simulated.backend import SimulatedBackend
from dtp_engine.simulated.cluster import GIB, Cluster, Faults, Pool
from dtp_engine.simulated.curves import Behaviour, values
from dtp_trainer import wire
from dtp_trainer.wire import ExitCode

ONE, TWO = AttemptId("j1", 1), AttemptId("j1", 2)
SPEC = JobSpec(
    name="digits",
    run="python train.py",
    nodes=NodeRange(1, 4),
    checkpoint=CheckpointPolicy(every=timedelta(seconds=10)),
    watchdog=Watchdog(timedelta(seconds=60), no_step_for=timedelta(seconds=30)),
)
MACHINE = Machine("m", cpus=2, memory_bytes=8 * GIB, gpus=0)


def plan(*workers: int, attempt: AttemptId = ONE, **changes: Any) -> LaunchPlan:
    first = LaunchPlan(attempt, "digits", SPEC, workers, len(workers), "secret", 3, 2)
    return replace(first, **changes)


def make_cluster(behaviour: Behaviour | None = None, **changes: Any) -> Cluster:
    behaviours = {"digits": behaviour or Behaviour(steps=1000, step_s=0.5)}
    return Cluster(VirtualClock(), behaviours=behaviours, **changes)


async def pass_time(cluster: Cluster, seconds: float) -> None:
    assert isinstance(cluster.clock, VirtualClock)
    await cluster.clock.advance(seconds)


async def status(cluster: Cluster, attempt: AttemptId = ONE) -> wire.Gang:
    told = (await SimulatedBackend(cluster).observe([attempt]))[attempt].status
    assert told is not None
    return told


async def codes(cluster: Cluster, attempt: AttemptId = ONE) -> list[int | None]:
    gang = (await SimulatedBackend(cluster).observe([attempt]))[attempt]
    exited = [w for w in gang.workers.values() if w.liveness is Liveness.EXITED]
    return [worker.exit_code for worker in exited]


async def lines(cluster: Cluster, **kwargs: Any) -> list[LogLine]:
    return [line async for line in SimulatedBackend(cluster).logs(ONE, **kwargs)]


# --------------------------------------------------------------------------- what is believable


def test_loss_falls_and_accuracy_rises() -> None:
    """As of a script that learns, with noise but without jumps."""
    script = Behaviour()
    losses = [values(script, step)["loss"] for step in range(0, 2001, 100)]
    assert losses[0] > 2 * losses[5] > 2 * losses[-1] > 0
    assert values(script, 2000)["accuracy"] > 0.9 > values(script, 20)["accuracy"]


async def test_more_workers_take_more_steps() -> None:
    """Nearly twice as many with two, never more than twice."""
    steps = []
    for workers in ((0,), (0, 1)):
        cluster = make_cluster()
        cluster.launch(plan(*workers))
        await pass_time(cluster, 102.5)
        steps.append((await status(cluster)).step or 0)
    assert 1.5 * steps[0] < steps[1] <= 2 * steps[0]


async def test_how_often_one_looks_changes_nothing() -> None:
    """The cluster is a function of its seed and of what it is told."""
    told = []
    for looks in (1, 100):
        cluster = make_cluster(faults=Faults(crashes_per_hour=200), seed=3)
        cluster.launch(plan(0, 1, 2))
        for _ in range(looks):
            await pass_time(cluster, 120 / looks)
            cluster.advance()
        told.append([(e.seq, round(e.at, 3), e.text) for e in cluster.memory("j1").events])
    assert told[0] == told[1]
    assert len(told[0]) > 3


async def test_job_finishes_and_every_worker_exits_with_success() -> None:
    """The gang's last word stays to be read."""
    cluster = make_cluster(Behaviour(steps=20, step_s=0.5))
    cluster.launch(plan(0, 1))
    await pass_time(cluster, 60)
    assert await codes(cluster) == [0, 0]
    assert ((await status(cluster)).outcome, (await status(cluster)).step) == (0, 20)


async def test_next_attempt_goes_on_from_the_newest_checkpoint() -> None:
    """Steps, generations and event numbers go on over attempts."""
    cluster = make_cluster()
    cluster.launch(plan(0))
    await pass_time(cluster, 30)
    cluster.stop(ONE, [0], kill=False)
    await pass_time(cluster, 5)
    assert await codes(cluster) == [ExitCode.PAUSED]
    saved = cluster.memory("j1").step
    cluster.launch(plan(0, attempt=TWO))
    await pass_time(cluster, 5)
    told = await status(cluster, TWO)
    assert (told.step or 0) >= saved > 40
    assert told.generation == 2
    assert [event.seq for event in told.events] == list(range(1, len(told.events) + 1))


async def test_lines_are_what_real_workers_print() -> None:
    """Each record survives the wire; each text line is parsed as one."""
    cluster = make_cluster()
    cluster.launch(plan(0, 1))
    await pass_time(cluster, 30)
    printed = await lines(cluster)
    for line in printed:
        if line.record is not None:
            assert wire.parse(wire.encode(line.record)) == line.record
        elif line.text is not None:
            assert wire.parse(wire.encode_text(line.text)) == line.text
    kinds = {type(line.record) for line in printed}
    assert kinds >= {wire.Window, wire.Host, wire.GangEvent, type(None)}


async def test_reading_in_pieces_gives_every_line_once() -> None:
    """A cursor goes on exactly behind its line."""
    cluster = make_cluster()
    cluster.launch(plan(0, 1))
    pieces: list[LogLine] = []
    cursors: dict[int, str] = {}
    for seconds in (7, 0.5, 11, 3.3):
        await pass_time(cluster, seconds)
        for line in await lines(cluster, after=dict(cursors)):
            cursors[line.worker] = line.cursor
            pieces.append(line)
    assert pieces == await lines(cluster)


# --------------------------------------------------------------------------- what goes wrong


async def test_lost_worker_costs_the_steps_since_the_checkpoint() -> None:
    """The others form the next generation in place."""
    cluster = make_cluster()
    cluster.launch(plan(0, 1))
    await pass_time(cluster, 30)
    before = (await status(cluster)).step or 0
    cluster.kill_worker(ONE, 0)
    await pass_time(cluster, 0.1)
    after = await status(cluster)
    assert (after.phase, after.leader) == ("forming", 1)
    assert (after.step or 0) <= before
    await pass_time(cluster, 5)
    assert (await status(cluster)).world_size == 1


async def test_spot_interruption_is_named_by_the_platform() -> None:
    """The worker checkpoints on the notice and leaves."""
    cluster = make_cluster()
    cluster.launch(plan(0, 1))
    await pass_time(cluster, 10)
    cluster.take_back(ONE, 1)
    await pass_time(cluster, 5)
    sight = (await SimulatedBackend(cluster).observe([ONE]))[ONE].workers[1]
    assert (sight.exit_code, sight.reason) == (ExitCode.PAUSED, Reason.SPOT_INTERRUPTION)


async def test_script_that_always_fails_uses_up_its_budget() -> None:
    """Then the gang ends with the failure."""
    cluster = make_cluster(Behaviour(always_fails_at=10, step_s=0.1))
    cluster.launch(plan(0))
    await pass_time(cluster, 60)
    told = await status(cluster)
    assert (told.outcome, told.errors_used) == (1, 4)
    assert "ValueError" in told.detail


async def test_script_that_hangs_is_noticed_by_its_watchdog() -> None:
    """And restarted in place."""
    cluster = make_cluster(Behaviour(hangs_at=(20,), step_s=0.1))
    cluster.launch(plan(0))
    await pass_time(cluster, 20)
    assert (await status(cluster)).step == 20
    await pass_time(cluster, 30)
    told = await status(cluster)
    assert told.hangs_used == 1
    assert (told.step or 0) > 20


async def test_worker_that_never_starts_is_alive_and_silent() -> None:
    """The platform knows no better."""
    cluster = make_cluster(faults=Faults(never_start=1.0))
    cluster.launch(plan(0))
    await pass_time(cluster, 600)
    gang = (await SimulatedBackend(cluster).observe([ONE]))[ONE]
    assert gang.workers[0].liveness is Liveness.ALIVE
    assert gang.status is None


async def test_deaf_worker_leaves_only_when_it_is_killed() -> None:
    """Asking is not enough."""
    cluster = make_cluster(faults=Faults(deaf=1.0))
    cluster.launch(plan(0))
    await pass_time(cluster, 10)
    cluster.stop(ONE, [0], kill=False)
    await pass_time(cluster, 600)
    assert await codes(cluster) == []
    cluster.stop(ONE, [0], kill=True)
    await pass_time(cluster, 1)
    assert await codes(cluster) == [137]


async def test_unreachable_cluster_raises_and_its_workers_train_on() -> None:
    """Nobody sees it, that is all."""
    cluster = make_cluster()
    cluster.launch(plan(0))
    await pass_time(cluster, 10)
    before = (await status(cluster)).step or 0
    cluster.be_unreachable(30)
    with pytest.raises(Unreachable):
        await SimulatedBackend(cluster).observe([ONE])
    await pass_time(cluster, 30)
    assert ((await status(cluster)).step or 0) > before + 40


async def test_workers_of_a_hidden_machine_are_unknown() -> None:
    """The others are seen."""
    cluster = make_cluster(machines=[replace(MACHINE, name="a", cpus=1), MACHINE])
    cluster.launch(plan(0, 1))
    cluster.hide("a", 30)
    seen = (await SimulatedBackend(cluster).observe([ONE]))[ONE].workers
    assert [seen[n].liveness for n in (0, 1)] == [Liveness.UNKNOWN, Liveness.ALIVE]


async def test_capacity_trickles_in_when_asked_for() -> None:
    """One machine after the other, up to what the pool has; asking twice is asking once."""
    pool = Pool(replace(MACHINE, cpus=1), most=3, boot_s=60, apart_s=20)
    cluster = make_cluster(machines=[], pool=pool)
    backend = SimulatedBackend(cluster)
    for _ in range(2):
        await backend.provision(CapacityRequest(ONE, 2, Resources(cpus=1)))
    free = []
    for seconds in (59, 2, 20, 600):
        await pass_time(cluster, seconds)
        free.append((await backend.capacity()).free_cpus)
    assert free == [0, 1, 2, 2]


async def test_worker_without_room_exits_and_says_so() -> None:
    """As a platform that had promised more than it had."""
    cluster = make_cluster(machines=[replace(MACHINE, cpus=1)])
    cluster.launch(plan(0, 1))
    sight = (await SimulatedBackend(cluster).observe([ONE]))[ONE].workers[1]
    assert sight.reason is Reason.NO_CAPACITY


# --------------------------------------------------------------------------- the demo


async def test_demo_shows_jobs_of_every_kind_and_obeys() -> None:
    """An engine like any other, with a history; nothing is left when it is closed."""
    async with await Demo().open() as engine:
        views = await engine.jobs()
        states = {view.job.state for view in views}
        assert states >= {JobState.RUNNING, JobState.PAUSED, JobState.FAILED, JobState.SUCCEEDED}
        running = next(v for v in views if v.job.state is JobState.RUNNING)
        assert running.gang is not None
        assert running.checkpoint is not None
        assert (await engine.pause(running.job.id)).intent == "PAUSE"
        home = engine.settings.home
    assert not home.exists()
