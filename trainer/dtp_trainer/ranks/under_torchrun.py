"""Between torchrun and a rank: connects the rank with its agent, and says how it really ended.

torchrun starts this program as a rank (``--no-python``). It takes what the agent left for the rank
in the folder named by ``DTP_TORCHRUN`` (`torchrun.py`): the environment, two named pipes for
output, one for word of it. The rank itself is a child in a process group of its own; it is ended
when torchrun is.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = "DTP_TORCHRUN"
NEWS = "news"
FROM_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
"""Its own word counts; of everything else, the agent's does."""
_LEFT_AS_ASKED = 75  # wire.ExitCode.PAUSED
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_SET_DEATH_SIGNAL = 1  # linux/prctl.h

_libc = ctypes.CDLL(None)


def output_of(folder: Path, local_rank: int, stream: str) -> Path:
    """The named pipe of ``out`` or ``err``."""
    return folder / f"{local_rank}.{stream}"


def environment_of(folder: Path, local_rank: int) -> Path:
    return folder / f"{local_rank}.env.json"


def _start(folder: Path, local_rank: int, argv: list[str]) -> subprocess.Popen[bytes]:
    given: dict[str, str] = json.loads(environment_of(folder, local_rank).read_text())
    env = {**given, **{name: os.environ[name] for name in FROM_TORCHRUN if name in os.environ}}
    out, err = (os.open(output_of(folder, local_rank, s), os.O_WRONLY) for s in ("out", "err"))
    os.dup2(out, 1)
    os.dup2(err, 2)
    found = shutil.which(argv[0], path=env.get("PATH")) or argv[0]
    rank = subprocess.Popen(
        [found, *argv[1:]],
        env=env,
        stdin=subprocess.DEVNULL,
        preexec_fn=_become_a_rank,  # noqa: PLW1509 - there is one thread
    )
    _let_go_of_output(out, err)
    return rank


def _let_go_of_output(*pipes: int) -> None:
    """It ends with the rank, and not with this process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    for number in (nowhere, *pipes):
        os.close(number)


def _become_a_rank() -> None:
    os.setpgid(0, 0)
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _tell(folder: Path, news: dict[str, Any]) -> None:
    """Lines this short are written at once, so those of several ranks do not mix."""
    with contextlib.suppress(OSError):
        pipe = os.open(folder / NEWS, os.O_WRONLY | os.O_NONBLOCK)
        os.write(pipe, json.dumps(news).encode() + b"\n")
        os.close(pipe)


def _watch_over(rank: subprocess.Popen[bytes]) -> None:
    """torchrun's SIGTERM goes on to the rank; torchrun's own end is the end of all."""

    def forward(number: int, _frame: FrameType | None) -> None:
        rank.send_signal(number)

    def orphaned(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR1, orphaned)
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGUSR1, 0, 0, 0)
    if os.getppid() == 1:
        orphaned(signal.SIGUSR1, None)


def main() -> int:
    folder, local_rank = Path(os.environ[FOLDER]), int(os.environ["LOCAL_RANK"])
    argv = sys.argv[1:]
    try:
        rank = _start(folder, local_rank, argv)
    except OSError as error:
        os.write(2, f"dtp: {argv[0]}: {error.strerror}\n".encode())
        code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
        _tell(folder, {"rank": local_rank, "pid": os.getpid(), "code": code})
        return code
    _watch_over(rank)
    _tell(folder, {"rank": local_rank, "pid": rank.pid})
    code = rank.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    _tell(folder, {"rank": local_rank, "pid": rank.pid, "code": code})
    # A pause is no failure, for which torchrun would end the ranks that still write their part.
    return 0 if code == _LEFT_AS_ASKED else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
