"""Processes of this machine: told from later ones with the same number, looked at, signalled.

Linux: everything is read from ``/proc``, and a signal goes through a descriptor of the process
(pidfd), so that it can never reach another one that got the number meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_CLOCK_STEP_S = 2.0
"""How far the wall clock may have been set between two readings of one process's start."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that exists, as seen once."""

    pid: int
    parent: int
    group: int
    start_time: float
    """Unix time, s, as `psutil.Process.create_time`."""

    @property
    def env(self) -> Mapping[str, str]:
        """What it was started with; a child that was forked has its parent's. Empty when it is
        gone or somebody else's."""
        try:
            raw = Path(f"/proc/{self.pid}/environ").read_bytes()
        except OSError:
            return {}
        pairs = (item.partition("=") for item in raw.decode(errors="replace").split("\0"))
        return {name: value for name, joined, value in pairs if joined}

    @property
    def command(self) -> tuple[str, ...]:
        try:
            raw = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return ()
        return tuple(raw.decode(errors="replace").split("\0")[:-1])

    def started_at(self, start_time: float) -> bool:
        return abs(self.start_time - start_time) < _CLOCK_STEP_S


def find(pid: int) -> Process | None:
    """None when there is no such process, or only a dead one that its parent has not reaped."""
    if pid <= 0:
        return None
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field, the name in brackets, may hold anything: the rest follows the last one.
    fields = raw[raw.rfind(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    started = _boot_time() + int(fields[19]) / _CLOCK_TICKS
    return Process(pid, int(fields[1]), int(fields[2]), started)


def everything() -> Iterator[Process]:
    """All processes that this one can see."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - thousands of names, no Path for each
        if name.isdigit() and (process := find(int(name))):
            yield process


def send(pid: int, number: signal.Signals, *, unless: Doubt) -> bool:
    """Signal the process `pid` unless it is another than the one meant; whether it was sent."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        process = find(pid)
        if process is None or unless(process):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
            return True
        return False
    finally:
        os.close(descriptor)


@cache
def _boot_time() -> float:
    """As `psutil.boot_time`; read once, so that a clock that is set does not move it for us."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime"):
            return float(line.split()[1])
    return 0.0


Doubt: TypeAlias = Callable[[Process], bool]
"""Whether a process is another than the one meant."""


class Children:
    """Processes that this one started and must reap, whoever asks for them later."""

    def __init__(self) -> None:
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running[process.pid] = process
            self._codes.pop(process.pid, None)

    def reap(self) -> None:
        """Collect those that have ended; never waits."""
        with self._lock:
            for pid, process in list(self._running.items()):
                code = process.poll()
                if code is not None:
                    del self._running[pid]
                    self._codes[pid] = code

    def code(self, pid: int) -> int | None:
        """How a child ended: its exit code, or 128 + the signal; None for one that runs or is not
        ours."""
        code = self._codes.get(pid)
        return 128 - code if code is not None and code < 0 else code


CHILDREN = Children()
"""Of this process: reaping belongs to it, not to any one backend in it."""
