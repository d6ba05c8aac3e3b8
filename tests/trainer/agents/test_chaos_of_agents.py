"""Random misfortune, one after another, upon real agents: the gang always comes together again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

from dtp_trainer import wire

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job, Worker

ROUNDS = 25


class Fate:
    """Does something to a random worker; keeps two to four of them there."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job, self.random = job, random.Random(seed)
        self.next = 2
        self.generations: list[int] = []
        self.seen: dict[int, wire.GangEvent] = {}

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self.job.workers if worker.process.poll() is None]

    def strike(self) -> str:
        blow = self.random.choice(
            [self.kill_rank, self.kill_agent, self.leave, self.join, self.freeze, self.term_rank]
        )
        blow()
        while len([w for w in self.alive if w not in self.leaving]) < 2:
            self.join()
        return blow.__name__

    leaving: list[Worker] = []  # noqa: RUF012 - one gang at a time

    def victim(self) -> Worker:
        return self.random.choice(self.alive)

    def kill_rank(self) -> None:
        self._to_ranks(signal.SIGKILL)

    def term_rank(self) -> None:
        self._to_ranks(signal.SIGTERM)

    def _to_ranks(self, number: int) -> None:
        for pid in self.victim().ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_agent(self) -> None:
        worker = self.victim()
        worker.ask(signal.SIGKILL)
        worker.ended()

    def leave(self) -> None:
        worker = self.victim()
        self.leaving = [*self.leaving, worker]
        worker.ask()

    def join(self) -> None:
        if len(self.alive) < 4:
            wished = len([w for w in self.alive if w not in self.leaving]) + 1
            self.job.launch(self.next, workers=wished)
            self.next += 1

    def freeze(self) -> None:
        worker = self.victim()
        worker.ask(signal.SIGSTOP)
        time.sleep(self.random.random())
        worker.ask(signal.SIGCONT)

    def check(self) -> None:
        """Numbers grow without gaps, and what was told stays told."""
        gang = self.job.gang()
        assert gang is not None
        for event in gang.events:
            assert self.seen.setdefault(event.seq, event) == event
        assert sorted(self.seen) == [*range(1, len(self.seen) + 1)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_misfortune(job: Job, seed: int) -> None:
    """After kills, leaves, joins and freezes in any order, ranks of a newer generation train; no
    generation has a rank twice; a pause of all ends it, and nothing is left."""
    fate = Fate(job, seed)
    job.train(2, "--steps", "1000000", error_budget=1000, hang_budget=1000)
    for _ in range(ROUNDS):
        time.sleep(fate.random.random())
        blow = fate.strike()
        job.until(lambda: job.stepped(1, world_size=None), timeout=60)
        fate.check()
        gang = job.gang()
        print(blow, gang and (gang.generation, gang.world_size, gang.leader))
    job.until(lambda: job.stepped(1), timeout=60)
    starts = [
        (window.generation, window.rank, worker.number)
        for worker in job.workers
        for window in worker.windows()
    ]
    owners: dict[tuple[int, int], set[int]] = {}
    for generation, rank, number in starts:
        owners.setdefault((generation, rank), set()).add(number)
    assert all(len(numbers) == 1 for numbers in owners.values())
    for worker in fate.alive:
        worker.ask()
    for worker in job.workers:
        claimed = (worker.folder / wire.CLAIM_FILE).exists()
        assert worker.ended() in ((75, -9) if claimed else (-15, -9))
    fate.check()
