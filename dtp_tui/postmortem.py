"""Why a job failed, and where its ranks hung: what `dtp show` prints first."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dtp_engine import inspection
from dtp_engine.engine import Engine
from dtp_engine.inspection import Failure, Stack
from dtp_engine.jobs import JobState
from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_tui.cleaning import harmless
from dtp_tui.labels import Tone
from dtp_tui.output import Output, terminal_width

LINES = 50
FRAMES = 5
_FRAME = re.compile(r'\s+File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.+)')
_PACKAGES = re.compile(r".*/(site|dist)-packages/")
_CAUSE = re.compile(
    r"(?:(?:failed|did not begin|same failure at step \d+): |(?=rank \d+ (?:is behind|waits in)))"
    r"(.*?)(?:; (?:next try|all \d+ retries|the only retry|no checkpoint holds).*)?$"
)
_SHORTEST_CAUSE = 12
"""Characters; a shorter one, such as "exit code 3", is no burden twice."""


@dataclass(frozen=True, slots=True)
class Findings:
    failure: Failure | None
    stacks: tuple[Stack, ...]
    """Of the newest hang: the rank that is blamed first."""
    hang: wire.GangEvent | None


async def look_into(engine: Engine, view: JobView) -> Findings:
    """The failure only of a job that failed; stacks of any that ever hung."""
    job = view.job
    stacks = await engine.storages.of(job.id, inspection.stacks)
    hang = _hang_of(view.gang, stacks)
    event = inspection.failed_rank(view.gang) if job.state is JobState.FAILED else None
    failure = None
    if event is not None and (hang is None or hang.seq < event.seq):
        lines = engine.logs(job.id, attempt=job.attempt)
        since = inspection.began_at(view.gang, event.generation)
        failure = await inspection.failure(event, lines, since=since, shown=LINES)
    return Findings(failure, _blamed_first(stacks, hang), hang)


def _hang_of(gang: wire.Gang | None, stacks: Sequence[Stack]) -> wire.GangEvent | None:
    """The event that tells of it, if it is still there."""
    generation = stacks[0].generation if stacks else None
    events = gang.events if gang else ()
    told = [event for event in events if event.name == "hang" and event.generation == generation]
    return told[-1] if told else None


def _blamed_first(stacks: Iterable[Stack], hang: wire.GangEvent | None) -> tuple[Stack, ...]:
    blamed = hang.rank if hang else None
    return tuple(sorted(stacks, key=lambda stack: (stack.rank != blamed, stack.rank)))


def record(found: Findings) -> dict[str, Any]:
    """The fields of ``dtp show --json``."""
    failure = found.failure
    return {
        "failure": None
        if failure is None
        else {
            "rank": failure.rank,
            "worker": failure.worker,
            "generation": failure.generation,
            "step": failure.step,
            "text": failure.text,
            "traceback": list(failure.traceback),
            "lines": list(failure.lines),
        },
        "hang": None
        if not found.stacks
        else {
            "generation": found.stacks[0].generation,
            "text": found.hang.text if found.hang else None,
            "rank": found.hang.rank if found.hang else None,
            "stacks": [{"rank": s.rank, "lines": list(s.lines)} for s in found.stacks],
        },
    }


def print_failure(out: Output, failure: Failure) -> None:
    """The traceback, then what the rank wrote before it."""
    at = f" at step {failure.step}" if failure.step else ""
    _heading(out, f"Rank {failure.rank} failed{at}, in generation {failure.generation}")
    for line in failure.traceback or (failure.text,):
        _say(out, line)
    if failure.lines:
        also = " beside that" if failure.traceback else ""
        _heading(out, f"What rank {failure.rank} wrote last{also}")
        for line in failure.lines:
            _say(out, line)


def print_stacks(out: Output, found: Findings, job: str, *, all_frames: bool) -> None:
    """Where each rank stood in the newest hang, the one that is blamed first."""
    if not found.stacks:
        return
    _heading(out, f"Where the ranks of generation {found.stacks[0].generation} hung")
    if found.hang is not None:
        _say(out, found.hang.text)
    for stack in found.stacks:
        out.say(f"  {out.paint(f'rank {stack.rank}', Tone.WARN)}")
        for line in stack.lines if all_frames else innermost(stack.lines):
            _say(out, line, indent=4)
    if not all_frames:
        out.say(f"  {out.paint(f'all of it: dtp show {job} --stacks', Tone.QUIET)}")


def innermost(lines: Sequence[str]) -> list[str]:
    """The newest frames of the main thread, one a line.

    >>> innermost(['Current thread 0x1 (most recent call first):', '  File "/a/x.py", line 7 in f'])
    ['f  /a/x.py:7']
    """
    starts = [at for at, line in enumerate(lines) if line.startswith("Current thread")]
    frames: list[str] = []
    for line in lines[starts[-1] + 1 :] if starts else ():
        found = _FRAME.match(line)
        if found is None or len(frames) == FRAMES:
            break
        file = _PACKAGES.sub("", found["file"])
        frames.append(f"{found['name']}  {file}:{found['line']}")
    return frames


def said_once(texts: Iterable[str]) -> list[str]:
    """The texts of a timeline, in which a cause that was told before is not told again.

    >>> said_once(["rank 0 failed: KeyError: 'lr'", "over: rank 0 failed: KeyError: 'lr'"])
    ["rank 0 failed: KeyError: 'lr'", 'over: rank 0 failed: as above']
    """
    causes: list[str] = []
    told = []
    for text in texts:
        short = text
        for cause in causes:
            short = short.replace(cause, "as above")
        told.append(short)
        cause = cause_of(text)
        if len(cause) >= _SHORTEST_CAUSE and cause not in causes:
            causes.append(cause)
    return told


def cause_of(text: str) -> str:
    """
    >>> cause_of("rank 3 failed: ValueError: bad lr (train.py:12); the only retry is used")
    'ValueError: bad lr (train.py:12)'
    >>> cause_of("worker 0 is gone: rank 1 is behind: it stands in load (x.py:8)")
    'rank 1 is behind: it stands in load (x.py:8)'
    """
    found = _CAUSE.search(text)
    return found[1] if found else ""


def _heading(out: Output, title: str) -> None:
    out.say()
    out.say(out.paint(title, Tone.BUSY))


def _say(out: Output, line: str, *, indent: int = 2) -> None:
    """A line of others."""
    for part in folded(out, harmless(line), indent=indent):
        out.say(f"{' ' * indent}{part}")


def folded(out: Output, text: str, *, indent: int) -> list[str]:
    """On a terminal no wider than it, behind an indent; what goes on is indented further."""
    width = terminal_width() - indent
    if not out.terminal or len(text) <= width:
        return [text]
    inner = " " * (len(text) - len(text.lstrip()) + 2)
    parts = textwrap.wrap(
        text, width, subsequent_indent=inner, drop_whitespace=False, break_on_hyphens=False
    )
    return [part.rstrip() for part in parts]
