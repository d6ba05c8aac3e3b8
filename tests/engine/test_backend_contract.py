"""What every backend promises to the controller: one body for all of them.

A backend joins by a harness (see `Harness`) named in `BACKENDS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Protocol

import pytest

from dtp_engine.backend import (
    Backend,
    CapacityRequest,
    Gang,
    LaunchPlan,
    Liveness,
    LogLine,
    WorkerSight,
)
from dtp_engine.jobs import AttemptId
from dtp_engine.logs import time_of

BACKENDS = ["simulated", "local"]
"""Names of fixtures, each a `Harness`."""

ONE = AttemptId("digits", 1)
TWO = AttemptId("digits", 2)
OTHER = AttemptId("words", 1)
NOW = timedelta(0)
SOON = timedelta(seconds=30)


class Harness(Protocol):
    """A backend, and the power over its workers that a test needs."""

    backend: Backend

    def plan(
        self,
        workers: Sequence[int] = (0,),
        *,
        attempt: AttemptId = ...,
        env: Mapping[str, str] | None = None,
        cpus: float = 0.25,
    ) -> LaunchPlan:
        """A worker leaves with 75 when it is asked to stop; with ``STUBBORN`` in `env` it does
        not."""
        ...

    async def look(self, attempt: AttemptId) -> Gang: ...

    async def until(self, attempt: AttemptId, met: Callable[[Gang], bool]) -> Gang: ...

    async def until_running(self, attempt: AttemptId, worker: int = 0) -> None: ...

    async def until_exited(self, attempt: AttemptId, worker: int = 0) -> WorkerSight: ...

    async def finish_worker(self, attempt: AttemptId, worker: int, code: int) -> None: ...

    async def kill_worker(self, attempt: AttemptId, worker: int) -> None: ...

    async def talk(self, attempt: AttemptId) -> None:
        """Let every running worker of the attempt print three lines more."""
        ...

    async def read(
        self, attempt: AttemptId, after: Mapping[int, str] | None = None
    ) -> list[LogLine]: ...


@pytest.fixture(params=BACKENDS)
def harness(request: pytest.FixtureRequest) -> Harness:
    found: Harness = request.getfixturevalue(request.param)
    return found


async def launched(harness: Harness, plan: LaunchPlan) -> None:
    await harness.backend.launch(plan)
    for worker in plan.workers:
        await harness.until_running(plan.attempt, worker)


def liveness(gang: Gang) -> dict[int, Liveness]:
    return {number: sight.liveness for number, sight in gang.workers.items()}


async def test_launched_workers_are_alive(harness: Harness) -> None:
    """Each worker of a plan, and no other, is seen alive from its launch on."""
    await harness.backend.launch(harness.plan([0, 2]))
    seen = liveness(await harness.look(ONE))
    assert seen == {0: Liveness.ALIVE, 2: Liveness.ALIVE}


async def test_unknown_attempt_has_no_workers(harness: Harness) -> None:
    """An attempt of which nothing was launched is absent, or has no workers and no status."""
    found = (await harness.backend.observe([ONE])).get(ONE)
    assert found is None or (dict(found.workers), found.status) == ({}, None)


async def test_one_look_sees_many_attempts(harness: Harness) -> None:
    """One call observes several attempts, each with its own workers."""
    await harness.backend.launch(harness.plan([0]))
    await harness.backend.launch(harness.plan([0, 1], attempt=OTHER))
    seen = await harness.backend.observe([ONE, OTHER])
    assert (set(seen[ONE].workers), set(seen[OTHER].workers)) == ({0}, {0, 1})


async def test_exit_code_arrives(harness: Harness) -> None:
    """A worker that ended is EXITED with its own code, and stays so; its neighbour lives on."""
    await launched(harness, harness.plan([0, 1]))
    await harness.finish_worker(ONE, 0, 3)
    assert (await harness.until_exited(ONE)).exit_code == 3
    seen = await harness.look(ONE)
    assert seen.workers[0].exit_code == 3
    assert liveness(seen) == {0: Liveness.EXITED, 1: Liveness.ALIVE}


async def test_killed_worker_is_no_success(harness: Harness) -> None:
    """A worker that was killed is EXITED with 128 + 9, or with no code, never with 0."""
    await launched(harness, harness.plan())
    await harness.kill_worker(ONE, 0)
    assert (await harness.until_exited(ONE)).exit_code in (137, None)


async def test_launch_again_changes_nothing(harness: Harness) -> None:
    """A replayed launch adopts what exists."""
    await harness.backend.launch(harness.plan([0]))
    await harness.backend.launch(harness.plan([0]))
    await harness.until_running(ONE)
    await harness.backend.launch(harness.plan([0, 1]))
    await harness.until_running(ONE, 1)
    await harness.finish_worker(ONE, 0, 0)
    assert (await harness.until_exited(ONE)).exit_code == 0
    assert set((await harness.look(ONE)).workers) == {0, 1}


async def test_what_existed_is_not_launched_again(harness: Harness) -> None:
    """A replayed launch leaves a worker that has ended as it is."""
    await launched(harness, harness.plan())
    await harness.finish_worker(ONE, 0, 5)
    await harness.until_exited(ONE)
    await harness.backend.launch(harness.plan())
    assert (await harness.until_exited(ONE)).exit_code == 5


async def test_stop_lets_the_worker_leave(harness: Harness) -> None:
    """A worker that is asked to stop leaves by itself, with its own code."""
    await launched(harness, harness.plan())
    await harness.backend.stop(ONE, [0], grace=SOON)
    assert (await harness.until_exited(ONE)).exit_code == 75


async def test_stop_reaches_only_its_workers(harness: Harness) -> None:
    """Other workers of the attempt, and other attempts, go on."""
    await launched(harness, harness.plan([0, 1]))
    await launched(harness, harness.plan([0], attempt=OTHER))
    await harness.backend.stop(ONE, [1], grace=SOON)
    await harness.until_exited(ONE, 1)
    assert liveness(await harness.look(ONE))[0] is Liveness.ALIVE
    assert liveness(await harness.look(OTHER)) == {0: Liveness.ALIVE}


async def test_stop_may_be_repeated(harness: Harness) -> None:
    """Repeating a stop, also after the end, is not an error and changes nothing."""
    await launched(harness, harness.plan())
    for _ in range(3):
        await harness.backend.stop(ONE, [0], grace=SOON)
    assert (await harness.until_exited(ONE)).exit_code == 75
    await harness.backend.stop(ONE, [0], grace=SOON)
    assert (await harness.look(ONE)).workers[0].exit_code == 75


async def test_stop_without_grace_kills(harness: Harness) -> None:
    """Grace zero ends a worker that would not leave."""
    await launched(harness, harness.plan(env={"STUBBORN": "1"}))
    await harness.backend.stop(ONE, [0], grace=SOON)
    assert liveness(await harness.look(ONE)) == {0: Liveness.ALIVE}
    await harness.backend.stop(ONE, [0], grace=NOW)
    assert (await harness.until_exited(ONE)).exit_code != 75


async def test_stop_before_launch_is_final(harness: Harness) -> None:
    """A worker stopped before it was launched is EXITED, and a late launch does not begin it."""
    await harness.backend.stop(ONE, [0], grace=SOON)
    await harness.until_exited(ONE)
    await harness.backend.launch(harness.plan())
    assert liveness(await harness.look(ONE)) == {0: Liveness.EXITED}


async def test_next_attempt_begins_anew(harness: Harness) -> None:
    """The same worker number in the next attempt is another worker."""
    await launched(harness, harness.plan())
    await harness.finish_worker(ONE, 0, 1)
    await harness.until_exited(ONE)
    await launched(harness, harness.plan(attempt=TWO))
    assert liveness(await harness.look(TWO)) == {0: Liveness.ALIVE}
    assert liveness(await harness.look(ONE)) == {0: Liveness.EXITED}


async def test_capacity_is_taken_and_given_back(harness: Harness) -> None:
    """What a worker reserves is not free from its launch until it is gone."""
    before = await harness.backend.capacity()
    await launched(harness, harness.plan([0, 1], cpus=0.5))
    during = await harness.backend.capacity()
    assert during.free_cpus == pytest.approx(before.free_cpus - 1.0)
    assert during.free_memory_bytes == before.free_memory_bytes - 2 * 2**20
    for worker in (0, 1):
        await harness.finish_worker(ONE, worker, 0)
        await harness.until_exited(ONE, worker)
    after = await harness.backend.capacity()
    assert after.free_cpus == pytest.approx(before.free_cpus)
    assert after.free_memory_bytes == before.free_memory_bytes


async def test_largest_worker_fits_an_empty_machine(harness: Harness) -> None:
    """The most that a worker may ask for fits when nothing runs; more never does."""
    capacity = await harness.backend.capacity()
    assert capacity.machines
    assert capacity.largest.cpus == max(machine.cpus for machine in capacity.machines)
    assert capacity.largest.gpus == max(machine.gpus for machine in capacity.machines)


async def test_provision_may_be_repeated(harness: Harness) -> None:
    """Asking for capacity twice is not an error and launches nothing."""
    request = CapacityRequest(ONE, 2, harness.plan().spec.resources)
    await harness.backend.provision(request)
    await harness.backend.provision(request)
    found = (await harness.backend.observe([ONE])).get(ONE)
    assert found is None or not found.workers


def by_worker(lines: Sequence[LogLine]) -> dict[int, list[LogLine]]:
    workers = sorted({line.worker for line in lines})
    return {worker: [line for line in lines if line.worker == worker] for worker in workers}


async def spoken(harness: Harness) -> list[LogLine]:
    """All lines of two workers that printed several."""
    await launched(harness, harness.plan([0, 1]))
    await harness.talk(ONE)
    await harness.talk(ONE)
    lines = await harness.read(ONE)
    assert all(len(found) >= 6 for found in by_worker(lines).values())
    assert set(by_worker(lines)) == {0, 1}
    return lines


async def test_lines_come_in_order(harness: Harness) -> None:
    """The lines of each worker come in the order of time, each either text or a record."""
    for lines in by_worker(await spoken(harness)).values():
        times = [time_of(line) for line in lines]
        assert times == sorted(times)
        assert all((line.text is None) != (line.record is None) for line in lines)


async def test_reading_again_finds_the_same(harness: Harness) -> None:
    """What was printed stays, and more comes behind it."""
    before = by_worker(await spoken(harness))
    await harness.talk(ONE)
    after = by_worker(await harness.read(ONE))
    for worker, lines in before.items():
        assert after[worker][: len(lines)] == lines
        assert len(after[worker]) >= len(lines) + 3


async def test_reading_goes_on_behind_any_line(harness: Harness) -> None:
    """Given the cursor of the last line seen of each worker, exactly the later lines come."""
    lines = await spoken(harness)
    for seen in range(len(lines)):
        cursor = {line.worker: line.cursor for line in lines[:seen]}
        rest = await harness.read(ONE, cursor)
        wanted = by_worker(lines[seen:])
        for worker, found in by_worker(rest).items():
            assert found[: len(wanted.get(worker, []))] == wanted.get(worker, [])


async def test_lines_of_a_worker_that_ended_stay(harness: Harness) -> None:
    """What a worker printed can be read after it is gone."""
    before = by_worker(await spoken(harness))
    for worker in (0, 1):
        await harness.kill_worker(ONE, worker)
        await harness.until_exited(ONE, worker)
    after = by_worker(await harness.read(ONE))
    for worker, lines in before.items():
        assert after[worker][: len(lines)] == lines


async def test_following_sees_what_comes_later(harness: Harness) -> None:
    """With `follow` the feed waits for more lines, also of a worker that joins later."""
    await launched(harness, harness.plan([0]))
    feed = harness.backend.logs(ONE, follow=True)
    seen: list[LogLine] = []

    async def collect() -> None:
        async for line in feed:
            seen.append(line)

    collecting = asyncio.create_task(collect())
    await harness.talk(ONE)
    await harness.until(ONE, lambda _: len(seen) >= 3)
    await launched(harness, harness.plan([0, 1]))
    await harness.talk(ONE)
    await harness.until(ONE, lambda _: len(by_worker(seen).get(1, [])) >= 3)
    assert (
        by_worker(seen)[0]
        == [line for line in await harness.read(ONE) if line.worker == 0][: len(by_worker(seen)[0])]
    )
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)


async def test_feed_of_an_attempt_without_workers_is_empty(harness: Harness) -> None:
    """Reading an attempt of which nothing was launched is not an error."""
    assert await harness.read(ONE) == []
