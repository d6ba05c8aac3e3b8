"""One worker in a terminal, for debugging: no gang, no watchdog, no warm process, nothing is kept.

``python -P -m dtp_trainer.foreground`` with ``DTP_LAUNCH`` = path of a launch file, whose folder is
removed at the end. Rank 0 has the terminal and runs under `ranks.debugging`; what the others write
comes line by line behind their names.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from dtp_trainer.gang.messages import Start
from dtp_trainer.ranks.launcher import is_forkable
from dtp_trainer.wire import Env, Launch
from dtp_trainer.worker.rank_env import rank_env

OTHERS_S = 10.0
"""How long the other ranks may take to end after rank 0 ended well."""
_OF_A_GANG = (
    *(Env.STORAGE, Env.STEPS_FILE, Env.ASK_FILE, Env.CHECKPOINT, Env.GENERATION),
    *("TORCHELASTIC_ERROR_FILE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"),
)
"""Variables of a rank that somebody watches; without them nothing is kept or reported."""
_SET_DEATH_SIGNAL = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)
_over = threading.Event()
"""Rank 0 has failed; what the others say to that is no news."""


def main() -> int:
    """The exit code of rank 0, as a shell shows it."""
    path = Path(os.environ.get(Env.LAUNCH, ""))
    signal.signal(
        signal.SIGINT, lambda *_: None
    )  # Ctrl-C is for rank 0, which takes it as Python does
    try:
        launch: Launch = Launch.from_dict(json.loads(path.read_bytes()))
        return _set_up(launch) or _run(launch, path.parent)
    except OSError as error:
        _say(f"cannot start in {error.filename}: {error.strerror}")
        return 1
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)


def _set_up(launch: Launch) -> int:
    if launch.setup is None:
        return 0
    done = subprocess.run(
        ["bash", "-c", launch.setup],
        cwd=launch.workdir,
        env={**os.environ, **launch.env},
        check=False,
    )
    code = done.returncode
    if code:
        _say(f"setup failed with exit code {code}")
    return code


def _run(launch: Launch, folder: Path) -> int:
    order = _order(launch)
    others = [_start_other(launch, order, rank, folder) for rank in range(1, order.world_size)]
    first = subprocess.Popen(
        _debugged(launch.command, launch.env),
        env=_env(launch, order, 0, folder),
        cwd=launch.workdir,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - no thread of ours runs yet, or holds a lock
    )
    code = first.wait()
    if code:
        _over.set()
    _end(others, patience_s=OTHERS_S if code == 0 else 0.0)
    return 128 - code if code < 0 else code


def _debugged(command: tuple[str, ...], env: Mapping[str, str]) -> list[str]:
    """Under the debugger where it is a Python program of this very interpreter."""
    if is_forkable(command, {**os.environ, **env, "DTP_NO_ZYGOTE": "0"}):
        return [sys.executable, "-P", "-m", "dtp_trainer.ranks.debugging", *command]
    _say(
        "breakpoint() works; an exception ends the script, as its command is not plain "
        "`python script.py` of the Python that dtp runs with"
    )
    return [*command]


def _start_other(launch: Launch, order: Start, rank: int, folder: Path) -> subprocess.Popen[str]:
    """In a session of its own: Ctrl-C and the terminal are rank 0's, and so is `breakpoint()`,
    which would end this one at the first read."""
    process = subprocess.Popen(
        launch.command,
        env={**_env(launch, order, rank, folder), "PYTHONBREAKPOINT": "0"},
        cwd=launch.workdir,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - as above
    )
    assert process.stdout is not None
    threading.Thread(target=_show, args=(rank, process.stdout, process), daemon=True).start()
    return process


def _show(rank: int, output: IO[str], process: subprocess.Popen[str]) -> None:
    for line in output:
        if _over.is_set():
            return
        sys.stderr.write(f"[rank{rank}] {line.rstrip()}\n")
    if (code := process.wait()) and not _over.is_set():
        _say(f"rank {rank} ended with {code}")


def _end(others: list[subprocess.Popen[str]], *, patience_s: float) -> None:
    for process in others:
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _order(launch: Launch) -> Start:
    return Start(
        generation=1,
        world_size=launch.nproc_per_node,
        first_rank=0,
        group_rank=0,
        group_world_size=1,
        master_addr="127.0.0.1",
        master_port=_free_port(),
        restart_count=0,
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _env(launch: Launch, order: Start, rank: int, folder: Path) -> dict[str, str]:
    unused = folder / f"rank-{rank}"
    env = rank_env(launch, order, rank, inherited=os.environ, steps_file=unused, error_file=unused)
    return {name: value for name, value in env.items() if name not in _OF_A_GANG}


def _die_with_parent() -> None:
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _say(text: str) -> None:
    sys.stderr.write(f"dtp: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
