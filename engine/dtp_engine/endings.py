"""How an attempt ended, in one value, and when to try again. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from dtp_engine.jobs import Attempt, Job
from dtp_trainer import wire
from dtp_trainer.wire import ExitCode

FIRST_BACKOFF = timedelta(seconds=1)
LONGEST_BACKOFF = timedelta(seconds=15)
FORGIVEN_AFTER = timedelta(minutes=10)
"""An attempt that ran for so long clears the record of the losses before it."""
MOST_NO_GANG = 3
"""Attempts in a row whose workers did not find each other."""
MOST_LOST_UNRUN = 10
"""Attempts in a row that lost all workers before any rank ran."""
KEPT_FAILURES = 10


class End(StrEnum):
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    """The script failed; the gang had spent its budget for errors or saw no use in trying again."""
    SETUP_FAILED = "SETUP_FAILED"
    HANG = "HANG"
    MAX_DURATION = "MAX_DURATION"
    STOPPED = "STOPPED"
    """Every worker left because the controller asked it to."""
    LEFT = "LEFT"
    """The workers left as asked, but something other than the controller asked them."""
    NO_GANG = "NO_GANG"
    PREEMPTED = "PREEMPTED"
    """The platform took the machines back."""
    LOST = "LOST"
    """The workers were killed, or died without a word from their gang."""


@dataclass(frozen=True, slots=True)
class Ending:
    kind: End
    words: str
    """One line for people."""
    code: int | None = None
    """Of the failing rank, with FAILED."""


_BY_CODE = {
    ExitCode.SUCCEEDED: (End.SUCCEEDED, "ended well"),
    ExitCode.PAUSED: (End.LEFT, "left as asked"),
    ExitCode.NO_GANG: (End.NO_GANG, "did not find the other workers in time"),
    ExitCode.HANG: (End.HANG, "took no step for too long"),
    ExitCode.FENCED: (End.LOST, "was fenced off before it took part"),
    ExitCode.MAX_DURATION: (End.MAX_DURATION, "ran for as long as it may"),
    ExitCode.SETUP_FAILED: (End.SETUP_FAILED, "could not be set up"),
}
_TELLING = (ExitCode.SUCCEEDED, ExitCode.HANG, ExitCode.MAX_DURATION)
"""Codes that a worker exits with only when its whole gang ended so. Set-up may fail for one worker
that joins, while the others train on."""
_CLEAN = (ExitCode.PAUSED, ExitCode.FENCED)


def read_ending(
    attempt: Attempt,
    status: wire.Gang | None,
    *,
    asked: bool,
    preempted: bool,
    last_words: str = "",
) -> Ending:
    """What became of an attempt without workers.

    The gang's own last word counts; exit codes stand in when it left none. `asked`: the controller
    had asked every worker to leave. `preempted`: the last ones went because the platform took their
    machines back. `last_words`: what the platform says of the last one's end.
    """
    if status is not None and status.phase == wire.GangPhase.ENDED and status.outcome is not None:
        return _by_code(status.outcome, status.detail, asked=asked)
    codes = {placement.exit_code for placement in attempt.placements}
    for code in _TELLING:
        if code in codes:
            return _by_code(code, "", asked=asked)
    if asked:
        return Ending(End.STOPPED, _leaving(attempt, status))
    if preempted:
        return Ending(End.PREEMPTED, "the platform took the machines back")
    return _unasked(attempt, last_words)


def _unasked(attempt: Attempt, last_words: str) -> Ending:
    unasked = [p for p in attempt.placements if p.stop_at is None] or list(attempt.placements)
    codes = {placement.exit_code for placement in unasked}
    if ExitCode.SETUP_FAILED in codes and attempt.running_at is None:
        return _by_code(ExitCode.SETUP_FAILED, last_words, asked=False)
    if ExitCode.NO_GANG in codes:
        return Ending(End.NO_GANG, "the workers did not find each other in time")
    if codes == {ExitCode.PAUSED}:
        return Ending(End.LEFT, "the workers left, not asked by the controller")
    last = max(unasked, key=lambda p: (p.ended_at or p.planned_at, p.worker))
    how = f"is gone: {last_words}" if last_words else exit_words(last.exit_code)
    return Ending(End.LOST, f"every worker is lost; the last one {how}")


def is_telling(code: int | None) -> bool:
    """Whether one worker's exit code says that its whole gang ended."""
    return code in _TELLING


def exit_words(code: int | None) -> str:
    """
    >>> exit_words(137)
    'was killed by signal 9'
    """
    if code is None:
        return "is gone; the platform names no exit code"
    if code in _BY_CODE:
        return _BY_CODE[ExitCode(code)][1]
    return f"was killed by signal {code - 128}" if 128 < code < 160 else f"exited with {code}"


def failures_after(job: Job, ending: Ending, *, step: int | None, ran_s: float) -> tuple[str, ...]:
    """The record of failures with this ending added."""
    before = () if ran_s >= FORGIVEN_AFTER.total_seconds() else job.last_failures
    where = "before it ran" if ran_s == 0 else "" if step is None else f"@ step {step}"
    return (*before, f"{ending.kind} {where}".strip())[-KEPT_FAILURES:]


def is_hopeless(failures: tuple[str, ...]) -> bool:
    """No machine and no patience will help: the same thing happened too often in a row."""
    newest = failures[-1]
    row = 0
    for failure in reversed(failures):
        if failure.partition(" ")[0] != newest.partition(" ")[0]:
            break
        row += 1
    if newest.startswith(End.NO_GANG):
        return row >= MOST_NO_GANG
    return row >= MOST_LOST_UNRUN and set(failures[-MOST_LOST_UNRUN:]) == {
        f"{End.LOST} before it ran"
    }


def backoff(losses: int) -> timedelta:
    """How long to wait after so many losses in a row: nothing after the first, then 1, 2, 4 … s.

    >>> [backoff(n).total_seconds() for n in (1, 2, 3, 4, 40)]
    [0.0, 1.0, 2.0, 4.0, 15.0]
    """
    if losses <= 1:
        return timedelta()
    return min(FIRST_BACKOFF * (1 << min(losses - 2, 20)), LONGEST_BACKOFF)


def _by_code(code: int, detail: str, *, asked: bool) -> Ending:
    if code not in _BY_CODE:
        return Ending(End.FAILED, detail or f"the script exited with {code}", code)
    kind, words = _BY_CODE[ExitCode(code)]
    if asked and kind is End.LEFT:
        return Ending(End.STOPPED, detail or words)
    return Ending(kind, detail or f"the gang {words}")


def _leaving(attempt: Attempt, status: wire.Gang | None) -> str:
    """What the workers that were asked to leave left behind, as far as anybody told."""
    for placement in attempt.placements:
        if placement.stop_at is not None and placement.exit_code not in _CLEAN:
            words = exit_words(placement.exit_code)
            return f"worker {placement.worker} {words}; the newest checkpoint counts"
    left = any(placement.exit_code == ExitCode.PAUSED for placement in attempt.placements)
    if not left:
        return "stopped before it began"
    killed = ", killed after the grace" if _was_killed(attempt, status) else ""
    return f"left as asked{killed}{_kept_words(status)}"


def _was_killed(attempt: Attempt, status: wire.Gang | None) -> bool:
    """Before its ranks run, an attempt's newest generation is the one of the attempt before."""
    if status is None or attempt.running_at is None:
        return False
    newest = (event for event in status.events if event.generation == status.generation)
    return any(event.name == "grace_over" for event in newest)


def _kept_words(status: wire.Gang | None) -> str:
    """Known, not sure: a leader that did not get to its last word may have missed a commit."""
    told = [e for e in status.events if e.name == "checkpoint"] if status else []
    if status is None or status.step is None or not told:
        return ""
    kept = max((event.generation, event.step or 0) for event in told)[1]
    if kept >= status.step:
        return f"; newest checkpoint: step {kept}"
    return f"; newest checkpoint known: step {kept}, the job was at step {status.step}"
