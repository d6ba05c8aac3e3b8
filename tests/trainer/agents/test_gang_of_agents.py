"""Several agents as one gang: they train together, and go on together whatever happens to one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from dtp_trainer import wire

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job, Worker

LONG = ("--steps", "100000")


def leader(job: Job) -> Worker:
    gang = job.gang()
    assert gang is not None
    return next(worker for worker in job.workers if worker.number == gang.leader)


def kill_a_rank(worker: Worker) -> None:
    for pid in worker.ranks():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_two_workers_train(job: Job) -> None:
    """Two workers form one generation of two ranks and both end with 0."""
    job.train(2)
    assert job.codes() == [0, 0]
    gang = job.gang()
    assert gang is not None
    assert (gang.phase, gang.outcome, gang.generation, gang.world_size) == ("ended", 0, 1, 2)
    assert (gang.step, gang.total_steps) == (20, 20)
    assert [event.seq for event in gang.events] == [*range(1, len(gang.events) + 1)]
    printed = [record for record in leader(job).log() if isinstance(record, wire.GangEvent)]
    assert printed == [*gang.events]


def test_killed_rank(job: Job) -> None:
    """kill -9 of a rank: the next generation trains, and the event names rank and signal."""
    workers = job.train(2, *LONG)
    job.until(lambda: job.stepped(1))
    kill_a_rank(workers[1])
    job.until(lambda: job.stepped(2))
    assert "rank 1 failed: killed by SIGKILL" in job.texts()
    for worker in workers:
        worker.ask()
    assert job.codes() == [75, 75]


def test_failing_rank_is_named(job: Job) -> None:
    """An exception ends its generation; the budget answers it, and the traceback's end is told."""
    job.train(2, "--fail", "1:3:1")
    assert job.codes() == [0, 0]
    assert "rank 1 failed: ValueError: bad batch 3" in job.texts()
    gang = job.gang()
    assert gang is not None
    assert (gang.generation, gang.errors_used, gang.restarts) == (2, 1, 1)


def test_error_budget_is_used_up(job: Job) -> None:
    """Without a budget the first failure ends every worker with the rank's own code."""
    job.train(2, "--fail", "1:3:9", error_budget=0)
    assert job.codes() == [1, 1]
    assert {w.exit()["reason"] for w in job.workers} == {"rank 1 failed: ValueError: bad batch 3"}


def test_same_failure_stops_early(job: Job) -> None:
    """The same error at the same step is tried three times, however large the budget is."""
    job.train(2, "--fail", "0:2:99", error_budget=50)
    assert job.codes() == [1, 1]
    assert job.story().count("generation_started") == 3
    assert "same_failure" in job.story()


def test_killed_agent_is_replaced(job: Job) -> None:
    """kill -9 of an agent: the other waits for the minimum, and trains on with the replacement."""
    workers = job.train(2, *LONG, min_workers=2)
    job.until(lambda: job.stepped(1))
    victim = next(worker for worker in workers if worker is not leader(job))
    victim.ask(signal.SIGKILL)
    job.until(lambda: "waiting_for_workers" in job.story())
    assert f"worker {victim.number} on 127.0.0.1 was lost" in job.texts()
    job.launch(2)
    job.until(lambda: job.stepped(2, world_size=2))
    for worker in job.workers:
        worker.ask()
    assert sorted(job.codes()) == [-9, 75, 75]


def test_killed_leader_is_succeeded(job: Job) -> None:
    """kill -9 of the leader: another is elected, numbers go on, and the rest trains on."""
    job.train(3, *LONG)
    job.until(lambda: job.stepped(1))
    old = leader(job)
    old.ask(signal.SIGKILL)
    job.until(lambda: job.stepped(2, world_size=2))
    gang = job.gang()
    assert gang is not None
    assert (gang.leader != old.number, gang.term >= 2, gang.restarts) == (True, True, 1)
    assert f"worker {old.number}, the leader, was lost" in job.texts()
    assert [event.seq for event in gang.events] == [*range(1, len(gang.events) + 1)]
    for worker in job.workers:
        worker.ask()
    assert sorted(job.codes()) == [-9, 75, 75]


def test_joiner_makes_room_for_itself(job: Job) -> None:
    """A worker that joins makes the others checkpoint and leave, then all train together."""
    job.train(1, *LONG)
    job.until(lambda: job.stepped(1))
    job.launch(1, workers=2)
    job.until(lambda: job.stepped(2, world_size=2))
    gang = job.gang()
    assert gang is not None
    assert gang.errors_used == 0
    for worker in job.workers:
        worker.ask()
    assert job.codes() == [75, 75]


def test_leaver_goes_alone(job: Job) -> None:
    """A worker asked to stop leaves with PAUSED; the others form the next generation."""
    workers = job.train(2, *LONG)
    job.until(lambda: job.stepped(1))
    staying = leader(job)
    leaving = next(worker for worker in workers if worker is not staying)
    leaving.ask()
    assert leaving.ended() == wire.ExitCode.PAUSED
    job.until(lambda: job.stepped(2, world_size=1))
    staying.ask()
    assert staying.ended() == wire.ExitCode.PAUSED


def test_leaving_leader_hands_over(job: Job) -> None:
    """A leader asked to stop drains, leaves with PAUSED, and another goes on without a failure."""
    workers = job.train(2, *LONG)
    job.until(lambda: job.stepped(1))
    leaving = leader(job)
    leaving.ask()
    assert leaving.ended() == wire.ExitCode.PAUSED
    job.until(lambda: job.stepped(2, world_size=1))
    gang = job.gang()
    assert gang is not None
    assert (gang.leader != leaving.number, gang.restarts, gang.errors_used) == (True, 0, 0)
    assert "worker_lost" not in job.story()
    for worker in workers:
        worker.ask()
    assert job.codes() == [75, 75]


def test_pause_of_all(job: Job) -> None:
    """All workers asked to stop leave with PAUSED, without a generation in between."""
    workers = job.train(3, *LONG)
    job.until(lambda: job.stepped(1))
    for worker in workers:
        worker.ask()
    assert job.codes() == [75, 75, 75]
    gang = job.gang()
    assert gang is not None
    assert (gang.phase, gang.outcome, gang.generation) == ("ended", 75, 1)


def test_hang_is_named(job: Job) -> None:
    """A rank that stands still is named, and the next generation trains."""
    job.train(2, "--hang", "1:5:1", "--steps", "60", no_step_for_s=1.5)
    assert job.codes() == [0, 0]
    (text,) = [text for text in job.texts() if "is behind" in text]
    assert text.startswith("rank 1 is behind: its last step is 4")


def test_hang_budget_is_used_up(job: Job) -> None:
    """A hang beyond its budget ends every worker with HANG."""
    job.train(2, "--hang", "1:5:9", "--steps", "100000", no_step_for_s=1.0, hang_budget=0)
    assert job.codes() == [77, 77]


def test_first_step_that_never_comes(job: Job) -> None:
    """A script that opened its step files and takes no step hangs when `start_within` is over."""
    (worker,) = job.train(1, "--hang", "0:1:9", *LONG, start_within_s=3.0, hang_budget=0)
    assert worker.ended() == wire.ExitCode.HANG
    assert "no rank took one" in worker.exit()["reason"]


def test_killed_after_the_grace(job: Job) -> None:
    """Ranks that take no notice of a pause are killed, and nobody says that they left well."""
    (worker,) = job.train(1, "--deaf", *LONG, grace_s=1.0)
    job.until(lambda: job.stepped(1))
    worker.ask()
    assert worker.ended() == wire.ExitCode.PAUSED
    assert job.story().count("grace_over") == 1
    assert "killed after the grace" in worker.exit()["reason"]


def test_wrong_secret_is_refused(job: Job) -> None:
    """A worker with another secret is refused and does not disturb the gang."""
    job.train(1, *LONG)
    job.until(lambda: job.stepped(1))
    (stranger,) = job.launch(1, secret="guessed")
    assert stranger.ended() == wire.ExitCode.FENCED
    assert "wrong secret" in stranger.exit()["reason"]
    gang = job.gang()
    assert gang is not None
    assert (gang.generation, gang.leader) == (1, 0)
    job.workers[0].ask()
    assert job.workers[0].ended() == wire.ExitCode.PAUSED


@pytest.mark.slow
def test_strangers_at_the_leaders_port(job: Job, tmp_path: Path) -> None:
    """A dead leader's port may belong to another gang by now: its refusal keeps nobody from
    forming a gang of his own."""
    job.train(1, *LONG)
    job.until(lambda: job.stepped(1))
    gang = job.gang()
    assert gang is not None
    dead = wire.Gang(1, 3, 7, gang.address, wire.GangPhase.RUNNING, 5, 0.0)
    other = tmp_path / "other"
    other.mkdir()
    (other / wire.GANG_KEY).write_bytes(wire.encode_object(dead))
    (late,) = job.launch(
        *[8], storage=other.as_uri(), secret="another", workers=1, command=["python", "train.py"]
    )
    assert late.ended() == 0
    job.workers[0].ask()
    assert job.workers[0].ended() == wire.ExitCode.PAUSED


def test_older_attempt_is_fenced(job: Job) -> None:
    """A newer attempt takes over: the older workers stop their ranks and leave with FENCED."""
    old = job.train(2, *LONG)
    job.until(lambda: job.stepped(1))
    (new,) = job.launch(0, attempt=2, workers=1, command=["python", "train.py"], secret="other")
    assert [worker.ended() for worker in old] == [78, 78]
    assert new.ended() == 0
    gang = job.gang()
    assert gang is not None
    assert (gang.attempt, gang.generation, gang.errors_used) == (2, 2, 0)
    assert [event.seq for event in gang.events] == [*range(1, len(gang.events) + 1)]
    (late,) = job.launch(5, attempt=1)
    assert late.ended() == wire.ExitCode.FENCED


def test_nobody_comes(job: Job) -> None:
    """Below the minimum for too long, the gang ends with NO_GANG."""
    job.options = {"command": ["python", "train.py"], "workers": 2, "min_workers": 2}
    job.launch(0, start_within_s=1.0)
    assert job.codes() == [wire.ExitCode.NO_GANG]
    assert "1 of at least 2 workers came" in job.workers[0].exit()["reason"]


@pytest.mark.slow
def test_frozen_agent_is_lost(job: Job) -> None:
    """An agent that stands still is lost after a few seconds, and comes back when it moves."""
    workers = job.train(2, *LONG)
    job.until(lambda: job.stepped(1))
    frozen = next(worker for worker in workers if worker is not leader(job))
    process = psutil.Process(frozen.process.pid)
    process.suspend()
    job.until(lambda: job.stepped(2, world_size=1))
    process.resume()
    job.until(lambda: job.stepped(3, world_size=2))
    for worker in workers:
        worker.ask()
    assert job.codes() == [75, 75]


@pytest.mark.slow
def test_full_disk_stops_no_training(job: Job, small_disk: Path) -> None:
    """While nothing can be published, ranks train on; the outcome reaches every worker all the
    same, and the trouble is told once."""
    job.storage = small_disk / "storage"
    workers = job.train(2, "--steps", "60")
    job.until(lambda: job.stepped(1))
    filling = small_disk / "filling"
    with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert job.codes() == [0, 0]
    told = [text for worker in workers for text in worker.texts() if "disk is full" in text]
    assert len(told) == 1


def test_all_killed_at_once(job: Job) -> None:
    """kill -9 of every agent leaves nothing; the next attempt begins where numbers stopped."""
    workers = job.train(2, *LONG)
    job.until(lambda: job.stepped(1))
    for worker in workers:
        worker.ask(signal.SIGKILL)
    job.until(lambda: not job.processes())
    started = time.time()
    job.launch(0, attempt=2, workers=1, command=["python", "train.py"])
    assert job.codes() == [-9, -9, 0]
    gang = job.gang()
    assert gang is not None
    assert gang.generation == 2
    assert "leader_elected" in [event.name for event in gang.events if event.at > started]
