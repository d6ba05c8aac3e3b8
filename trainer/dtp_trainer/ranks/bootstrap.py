"""From a fork to a rank: what a child of the zygote does between `os.fork` and the user's code.

A child never returns from `become`: it runs the program in place or executes a fresh one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Self

from dtp_trainer.ranks import program

_SET_DEATH_SIGNAL, _SET_NAME, _SET_SUBREAPER = 1, 15, 36  # linux/prctl.h
_LIMITS = ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_STACK", "RLIMIT_MEMLOCK", "RLIMIT_AS")
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # a shell's exit codes
_FAREWELL_S = 0.1

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Order:
    """What a child is to become."""

    id: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    fresh: bool
    """Execute `argv` instead of running the Python program it names in place."""
    inherited: Mapping[str, Any]
    """`inherited()` of the process that asked."""

    @classmethod
    def of(cls, message: Mapping[str, Any], *, warm: bool) -> Self:
        """A received order; a process that is not `warm` has nothing that a program could share."""
        order = cls(**{**message, "argv": tuple(message["argv"])})
        return order if warm else replace(order, fresh=True)


@dataclass(frozen=True, slots=True)
class Birth:
    """A child just forked, with what it was given."""

    order: Order
    parent: int
    stdout: int
    stderr: int
    report: int
    """Write end of a pipe for JSON lines ``{"formed_group": …, "error": …}``; the last counts."""
    path: tuple[str, ...]
    """`sys.path` of a program without a folder of its own."""


def inherited() -> dict[str, Any]:
    """What a child takes from its parent and a rank must take from its agent: umask, limits, cores,
    niceness."""
    mask = os.umask(0o077)
    os.umask(mask)
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS}
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return {"umask": mask, "limits": limits, "cpus": [*os.sched_getaffinity(0)], "nice": nice}


def set_name(name: str) -> None:
    """Of this process, as `ps` and `top` show it; at most 15 bytes."""
    _libc.prctl(_SET_NAME, name.encode(), 0, 0, 0)


def set_command_line(argv: Sequence[str]) -> None:
    """Of this process, as `ps` and `nvidia-smi` show it; cut to the length of the one it has."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # proc(5): arg_start, arg_end
    text = b"\0".join(map(os.fsencode, argv))[: end - start - 1]
    if start:
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that somebody reaps them."""
    _libc.prctl(_SET_SUBREAPER, 1, 0, 0, 0)


def become(birth: Birth) -> NoReturn:
    """Turn this freshly forked process into the rank that was ordered."""
    try:
        _detach(birth)
        _take_on(birth.order)
        _start(birth)
    except OSError as error:
        _refuse(birth.report, f"cannot start in {birth.order.cwd}: {error.strerror}")
    except ValueError as error:
        _refuse(birth.report, f"cannot start with this environment: {error}")


def _detach(birth: Birth) -> None:
    """From the parent: own process group, own output, and a death that follows the parent's."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != birth.parent:  # it died before it could have signalled us
        os._exit(1)
    set_name(f"dtp:rank{birth.order.env.get('RANK', '')}")
    set_command_line(birth.order.argv)
    os.dup2(birth.stdout, 1)
    os.dup2(birth.stderr, 2)
    os.closerange(3, birth.report)
    os.closerange(birth.report + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    _reset_signals()


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _take_on(order: Order) -> None:
    inherit = order.inherited
    os.umask(inherit["umask"])
    for name, limit in inherit["limits"].items():
        with contextlib.suppress(OSError, ValueError):  # ours may be lower: then they stay
            resource.setrlimit(getattr(resource, name), tuple(limit))
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, inherit["cpus"])
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, inherit["nice"])
    os.environ.clear()
    os.environ.update(order.env)
    os.chdir(order.cwd)


def _start(birth: Birth) -> NoReturn:
    order = birth.order
    found = None if order.fresh else program.parse(order.argv)
    if found is None:
        _execute(order, birth.report)
    folders = program.search_path(found, order.env)
    if program.shadowing(folders):
        os.execve(sys.executable, [sys.executable, *order.argv[1:]], dict(order.env))  # noqa: S606
    _run(found, birth, (*folders, *birth.path))


def _run(found: program.Program, birth: Birth, path: tuple[str, ...]) -> NoReturn:
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGPIPE, signal.SIG_IGN),
        (signal.SIGXFSZ, signal.SIG_IGN),
    ):
        signal.signal(number, handler)  # as Python itself does when it starts
    program.prepare(found, birth.order.argv, path)
    groups = _watch_groups(birth.report)
    _ease_farewells()
    ending = program.run(found)
    _report(birth.report, formed_group=groups(), error=ending.error)
    if ending.code < 0:
        signal.signal(-ending.code, signal.SIG_DFL)
        os.kill(os.getpid(), -ending.code)
    os._exit(ending.code)


def _execute(order: Order, report: int) -> NoReturn:
    name = order.argv[0]
    found = shutil.which(name, path=order.env.get("PATH", os.defpath))
    argv = list(order.argv)
    if found is None and name in ("python", "python3"):
        found = argv[0] = sys.executable
    if found is None:
        exists = os.path.exists(name)  # noqa: PTH110
        problem = "is not executable" if exists else "was not found"
        _refuse(report, f"{name} {problem}", _NOT_EXECUTABLE if exists else _NOT_FOUND)
    try:
        os.execve(found, argv, dict(order.env))  # noqa: S606
    except OSError as error:
        _refuse(report, f"{found}: {error.strerror}")


def _refuse(report: int, problem: str, code: int = _NOT_EXECUTABLE) -> NoReturn:
    os.write(2, f"dtp: {problem}\n".encode(errors="backslashreplace"))
    _report(report, formed_group=False, error=problem)
    os._exit(code)


def _watch_groups(report: int) -> Any:
    """A function that tells whether `torch.distributed` has had a process group since now; None
    where that cannot be known. A group is reported at once too: a killed rank has no last word."""
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    inner = getattr(c10d, "_update_default_pg", None)
    if c10d is None or inner is None:
        return _late_look
    formed: list[bool] = []

    def update(group: object) -> None:
        if group is not None and not formed:
            formed.append(True)
            _report(report, formed_group=True, error=None)
        inner(group)

    vars(c10d)["_update_default_pg"] = update
    return lambda: bool(formed)


def _ease_farewells() -> None:
    """Give the threads of a process group a moment before it is destroyed.

    torch 2.13 waits for gloo's threads with the interpreter locked. One of them that needs the lock
    then, to drop what the last backward pass left to it, waits for ever: on a busy machine in every
    fifth script that destroys its group right after training.
    """
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    inner = getattr(c10d, "destroy_process_group", None)
    if c10d is None or inner is None:
        return

    @functools.wraps(inner)
    def destroy_process_group(*args: Any, **options: Any) -> None:
        time.sleep(_FAREWELL_S)
        inner(*args, **options)

    for module in (c10d, sys.modules["torch.distributed"]):
        vars(module)["destroy_process_group"] = destroy_process_group


def _late_look() -> bool | None:
    """For a program that imported torch by itself: a group destroyed in between is not seen."""
    torch: ModuleType | None = sys.modules.get("torch.distributed.distributed_c10d")
    return (torch.is_initialized() or None) if torch else False


def _report(report: int, *, formed_group: bool | None, error: str | None) -> None:
    line = json.dumps({"formed_group": formed_group, "error": error}) + "\n"
    with contextlib.suppress(OSError):  # the program may have closed it
        os.write(report, line.encode())
