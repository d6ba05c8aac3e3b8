"""A leader that fails by a mistake of ours: said, counted, tried again with pauses, and not for
ever."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from dtp_trainer import wire
from dtp_trainer.gang.candidate import FAILURES_IN_A_ROW, pause_s

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job


def poison(job: Job) -> None:
    """A list of checkpoints that is well-formed JSON and breaks whoever compares its steps."""
    entry = wire.CheckpointEntry("step-000003.g0000", 3, 0, 1, 1, 0.0, 1)
    sound = wire.encode_object(wire.CheckpointHead(0, None, (entry,)))
    path = job.storage / wire.HEAD_KEY
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sound.replace(b'"step": 3', b'"step": "three"'))


def said(job: Job) -> list[wire.Text]:
    lines = [line for worker in job.workers for line in worker.log() if isinstance(line, wire.Text)]
    return sorted((line for line in lines if "the leader failed" in line.text), key=lambda t: t.at)


def test_leaders_that_fail_again_and_again(job: Job) -> None:
    """Every failure is one line, the pauses grow, and after a few the gang ends with the reason."""
    poison(job)
    job.train(2)
    assert job.codes() == [1, 1]
    reasons = {worker.exit()["reason"] for worker in job.workers}
    assert len(reasons) == 1
    assert reasons.pop().startswith("the leader failed 4 times in a row: TypeError: '>' not")
    lines = said(job)
    assert len(lines) == FAILURES_IN_A_ROW
    gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(lines)]
    assert all(gap >= pause_s(number) for number, gap in enumerate(gaps, start=1))
    assert job.story()[-1] == "gang_ended"


def test_leader_that_fails_once(job: Job) -> None:
    """What was only a passing trouble is told of, and the gang trains; it is not held against the
    next leader for good."""
    poison(job)
    job.train(2)
    job.until(lambda: said(job))
    (job.storage / wire.HEAD_KEY).unlink()
    assert job.codes() == [0, 0]
    assert "leader_failed" in job.story()
    assert "gang_ended" in job.story()
