"""Where the ranks of a hang stood: asked by their agent, kept in the job's storage.

Python's own stacks come from `faulthandler`, which writes them to the rank's stderr when it gets
SIGABRT. Before that, what only a living process can tell: native frames where ``py-spy`` is
installed, and NCCL's flight recorder, which torch dumps when a byte is written to a pipe of its.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dtp_trainer.inspection import stack_key
from dtp_trainer.storage import StorageError, open_storage

ASK_WITHIN_S = 4.0
"""Ranks that cannot be killed within 10 s count as lost, so this must stay well below."""
KEEP_WITHIN_S = 5.0
_POLL_S = 0.1
_DUMP = "Fatal Python error"
_AFTER_DUMP = "Extension modules:"


def recorder_env(folder: Path) -> dict[str, str]:
    """Switches NCCL's flight recorder on, with its pipes and dumps in `folder`."""
    prefix = str(folder / "nccl-")
    return {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
    }


class Evidence:
    """Of one generation on one worker.

    storage: URI of the job's. folder: the one of `recorder_env`.
    """

    def __init__(self, storage: str, generation: int, folder: Path) -> None:
        self._uri, self._generation, self._folder = storage, generation, folder
        self._native: dict[int, str] = {}
        self._keeping: list[asyncio.Task[None]] = []
        self.wanted = False
        """The ranks were asked, so how they end tells where they stood."""

    async def ask(self, ranks: Mapping[int, Sequence[int]]) -> None:
        """What living ranks can tell. ranks: rank → the processes of its script."""
        self.wanted = True
        work = [self._ask_recorder(rank) for rank in ranks]
        if py_spy := shutil.which("py-spy"):
            work += [self._ask_native(py_spy, rank, pids) for rank, pids in ranks.items()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_WITHIN_S):
                await asyncio.gather(*work)

    def keep(self, rank: int, stderr: Iterable[str]) -> None:
        """What rank wrote when it was told to say where it stands; stored in the background."""
        parts = [dump_in(stderr), self._native.get(rank, "")]
        text = "\n\n".join(part for part in parts if part)
        if text:
            self._keeping.append(asyncio.create_task(self._keep(rank, text)))

    async def kept(self) -> None:
        """Until all is stored; not for ever."""
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=KEEP_WITHIN_S)

    async def _keep(self, rank: int, text: str) -> None:
        with contextlib.suppress(StorageError, OSError):  # it is in the log as well
            await asyncio.to_thread(self._store, rank, text)

    def _store(self, rank: int, text: str) -> None:
        storage = open_storage(self._uri)
        key = stack_key(self._generation, rank)
        storage.write(key, f"{text}\n".encode("utf-8", "replace"))
        recorded = self._folder / f"nccl-{rank}"
        if recorded.is_file():
            key = stack_key(self._generation, rank, "nccl.pickle")
            storage.write(key, recorded.read_bytes())

    async def _ask_recorder(self, rank: int) -> None:
        """Nothing where NCCL is not in use: then nobody reads a pipe."""
        pipe, dump = self._folder / f"nccl-{rank}.pipe", self._folder / f"nccl-{rank}"
        try:
            writing = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return
        with contextlib.suppress(OSError):
            os.write(writing, b"1\n")
        os.close(writing)
        while not (dump.is_file() and dump.stat().st_size):  # noqa: ASYNC110 - another process's file
            await asyncio.sleep(_POLL_S)

    async def _ask_native(self, py_spy: str, rank: int, pids: Sequence[int]) -> None:
        for pid in pids:
            asked = await asyncio.create_subprocess_exec(
                *(py_spy, "dump", "--native", "--pid", str(pid)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                told, _ = await asked.communicate()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    asked.kill()
            if asked.returncode == 0:
                self._native[rank] = told.decode("utf-8", "replace").strip()


def dump_in(stderr: Iterable[str]) -> str:
    """The last dump by `faulthandler` in these lines; empty without one."""
    lines = [*stderr]
    starts = [at for at, line in enumerate(lines) if line.startswith(_DUMP)]
    if not starts:
        return ""
    dump = lines[starts[-1] + 1 :]
    end = next((at for at, line in enumerate(dump) if line.startswith(_AFTER_DUMP)), len(dump))
    return "\n".join(dump[:end]).strip()
