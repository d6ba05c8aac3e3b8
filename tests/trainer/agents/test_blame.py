"""Which rank is blamed, and what its failure is called."""

from __future__ import annotations

from dtp_trainer.gang import blame
from dtp_trainer.gang.messages import RankExited

LOST_PEER = "torch.distributed.DistBackendError: NCCL error: remote process exited"


def exited(rank: int, code: int, error: str = "", *, killed: bool = False) -> RankExited:
    return RankExited(1, rank, code, error=error, killed=killed)


def blamed(*exits: RankExited) -> int | None:
    found = blame.culprit(exits)
    return None if found is None else found.rank


def test_first_failure_is_blamed() -> None:
    """Of two own errors the first one heard of counts."""
    assert blamed(exited(1, 1, "ValueError: x"), exited(0, 1, "KeyError: y")) == 1


def test_own_error_before_a_lost_peer() -> None:
    """Ranks that only lost a peer are not blamed while another has an error of its own."""
    assert blamed(exited(0, 1, LOST_PEER), exited(1, 1, "ValueError: x")) == 1
    assert blamed(exited(0, 1, LOST_PEER), exited(1, -9)) == 1
    assert blamed(exited(0, 1, LOST_PEER), exited(1, -9, "ValueError: x", killed=True)) == 1


def test_lost_peer_when_there_is_nothing_else() -> None:
    """With nobody else to blame, the one that lost a peer is."""
    assert blamed(exited(0, 1, LOST_PEER), exited(1, -9, killed=True)) == 0


def test_killed_and_paused_ranks_are_innocent() -> None:
    """Ranks that their agent killed, that paused or that ended well are not blamed."""
    assert blamed(exited(0, -9, killed=True), exited(1, 75), exited(2, 0)) is None


def test_last_error_of_a_traceback() -> None:
    """The line that names the error is found among what follows it, without torch's prefix."""
    stderr = [
        "[rank1]: Traceback (most recent call last):",
        '[rank1]:   File "x.py", line 1, in <module>',
        "[rank1]: ValueError: bad lr",
        "[rank1]:[W1123 08:00 ProcessGroup.cpp:1] Warning: destroy_process_group() was not called",
    ]
    assert blame.last_error(stderr) == "ValueError: bad lr"
    assert blame.last_error(["bash: line 1: foo: command not found", ""]) == (
        "bash: line 1: foo: command not found"
    )
    assert blame.last_error([]) == ""


DUMP = """
loading …
Fatal Python error: Aborted

Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007f2 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/c10d.py", line 1 in wait
  File "/home/ana/train.py", line 12 in <module>

Extension modules: numpy (total: 1)
"""


def test_stack_of_a_dump() -> None:
    """Of a dump, the script's own innermost line counts, and whether it waits for others there."""
    assert blame.stack(DUMP.splitlines()) == ("<module> (train.py:12)", True)
    alone = DUMP.replace("/torch/distributed/", "/numpy/core/")
    assert blame.stack(alone.splitlines()) == ("<module> (train.py:12)", False)
    assert blame.stack(["no dump here"]) == ("", False)


def test_codes() -> None:
    """Signals count as in a shell; codes that mean something else of a gang do not pass."""
    assert blame.outcome(exited(0, -9)) == 137
    assert blame.outcome(exited(0, 3)) == 3
    assert blame.outcome(exited(0, 77)) == 1
    assert blame.describe(exited(0, 3)) == "exit code 3"
