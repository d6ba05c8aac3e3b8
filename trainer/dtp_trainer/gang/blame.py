"""Which rank failed first, and what to call its failure: pure functions over how ranks exited."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from dtp_trainer.gang.messages import RankExited
from dtp_trainer.wire import ExitCode

_PEER_ERRORS = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|closed by peer|gloo|nccl|ucc|"
    r"DistBackendError|DistNetworkError|DistStoreError|remote process|socket ?timeout",
    re.IGNORECASE,
)
_RANK_PREFIX = re.compile(r"^\[rank\d+\]:\s*")  # torch's own, on each line of a traceback
_ERROR_NAME = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
_FRAME = re.compile(r'\s+File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.+)')
_LIBRARY = re.compile(r"/(site|dist)-packages/|/lib/python3|^<|/dtp_trainer/")
_WAITING = re.compile(r"/torch/(distributed|autograd|nn/parallel)/")
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
_LONGEST = 300
_MEANINGFUL = frozenset(ExitCode)


def shell_code(code: int) -> int:
    """A process's exit code as a shell shows it: 128 + signal for one that a signal ended."""
    return 128 - code if code < 0 else code


def left_as_asked(exited: RankExited) -> bool:
    """How ranks end that were sent SIGTERM, with a checkpoint or without."""
    asked = (ExitCode.SUCCEEDED, ExitCode.PAUSED, 128 + signal.SIGTERM)
    return exited.killed or shell_code(exited.code) in asked


def failed(exited: RankExited) -> bool:
    """It ended by itself, and neither well nor with a pause."""
    return not exited.killed and exited.code not in (ExitCode.SUCCEEDED, ExitCode.PAUSED)


def culprit(exits: Iterable[RankExited]) -> RankExited | None:
    """The rank whose failure explains the others, in order of their exits.

    Ranks that lose a peer fail too, often before the one that caused it has left its interpreter.
    So what counts first is an own error, then a signal, then an own error of a rank that was
    killed while it was leaving; the errors of those that only lost a peer count last.
    """
    suspects = [e for e in exits if _suspicion(e) is not None]
    return min(suspects, key=lambda e: _suspicion(e) or 0, default=None)


def outcome(exited: RankExited) -> int:
    """The exit code that stands for a failed rank, as a shell shows it; none that means something
    else of a gang."""
    code = ExitCode.FAILED if exited.killed else shell_code(exited.code)
    return ExitCode.FAILED if code in _MEANINGFUL else code


def stuck(exits: Sequence[RankExited], behind: int | None) -> RankExited | None:
    """The rank that is behind by its steps, or else the first that stood in code of its own while
    others stood in calls that wait for it; None when their stacks tell nothing."""
    told = [e for e in exits if e.stands_in]
    if behind is not None:
        return next((e for e in told if e.rank == behind), None)
    own = [e for e in told if not e.waits]
    return min(own, key=lambda e: e.rank) if own and len(own) < len(told) else None


def apart(exits: Sequence[RankExited]) -> tuple[RankExited, str] | None:
    """All wait for others, and one of them in another place than the rest, so that they wait for
    ever: it, and where the rest stand. Of two it is the one further down in the file: it left out
    what the other waits in."""
    places: dict[str, list[RankExited]] = {}
    for exited in exits:
        if exited.stands_in:
            places.setdefault(exited.stands_in, []).append(exited)
    if len(places) != 2:
        return None
    few, many = sorted(places.values(), key=lambda ranks: (len(ranks), -_line(ranks[0])))
    return (few[0], many[0].stands_in) if len(few) == 1 else None


def _line(exited: RankExited) -> int:
    found = re.search(r":(\d+)\)$", exited.stands_in)
    return int(found[1]) if found else 0


def lost_a_peer(exited: RankExited) -> bool:
    return bool(_PEER_ERRORS.search(exited.error))


def _suspicion(exited: RankExited) -> int | None:
    own_error = bool(_ERROR_NAME.match(exited.error)) and not lost_a_peer(exited)
    if exited.unstartable:
        return 0
    if failed(exited):
        return 3 if lost_a_peer(exited) else 1
    return 2 if exited.killed and own_error else None


def describe(exited: RankExited) -> str:
    """
    >>> describe(RankExited(generation=1, rank=3, code=-9))
    'killed by SIGKILL'
    """
    if exited.code < 0 and not exited.killed:
        where = f" in {exited.stands_in}" if exited.stands_in else ""
        return f"killed by {_signal_name(-exited.code)}{where}"
    if exited.error:
        return exited.error
    return f"exit code {exited.code}"


def reason(exited: RankExited) -> str:
    """As `describe`, for an outcome that is shown together with its exit code."""
    silent = not exited.error and exited.code > 0 and outcome(exited) == exited.code
    return "no error message" if silent else describe(exited)


def signature(exited: RankExited) -> str:
    """Equal for failures that will come again. A signal from outside is no such failure."""
    outside = exited.code in _FROM_OUTSIDE and not exited.killed
    where = f"generation {exited.generation}, step" if outside else "step"
    return f"{describe(exited)} @ {where} {exited.step}"


def last_error(stderr: Sequence[str]) -> str:
    """The line that names the error: the end of the last traceback, else the last line."""
    lines = [_RANK_PREFIX.sub("", line).strip() for line in stderr]
    written = [line for line in lines if line]
    named = [line for line in written if _ERROR_NAME.match(line)] or written
    return named[-1][:_LONGEST] if named else ""


def stack(stderr: Sequence[str]) -> tuple[str, bool]:
    """Of a dump by `faulthandler`: where the main thread stood in the script's own code, as
    ``load (train.py:12)``, and whether it waited for other ranks there. Empty without a dump."""
    starts = [i for i, line in enumerate(stderr) if line.startswith("Current thread")]
    if not starts:
        return "", False
    frames = []
    for line in stderr[starts[-1] + 1 :]:
        found = _FRAME.match(line)
        if found is None:
            break
        frames.append(found)
    own = next((f for f in frames if not _LIBRARY.search(f["file"])), frames[0] if frames else None)
    if own is None:
        return "", False
    waits = any(_WAITING.search(frame["file"]) for frame in frames)
    return f"{own['name']} ({PurePath(own['file']).name}:{own['line']})", waits


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
