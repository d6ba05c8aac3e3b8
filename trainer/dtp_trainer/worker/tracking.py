"""The process that feeds trackers, seen from the agent: started, fed, started again, never waited
for while there is work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from dtp_trainer.trackers.tracker import about, encode_about
from dtp_trainer.wire import Env, Exit, Launch, Record, encode

STARTS = 4
LONGEST_BACKLOG = 8 << 20
"""Bytes that wait for a process that does not read them; then it counts as hung."""
RETRY_S = 2.0
ERRORS_FILE = "trackers.log"
COMMAND = (sys.executable, "-P", "-m", "dtp_trainer.trackers")


class TrackersProcess:
    """Feeds ``python -m dtp_trainer.trackers``. Nothing here raises or blocks.

    say: told what the process says, and what became of it, a line at a time.
    """

    def __init__(self, launch: Launch, *, term: int, say: Callable[[str], None]) -> None:
        self._launch, self._term, self._say = launch, term, say
        self._process: asyncio.subprocess.Process | None = None
        self._closing = False
        self._working = asyncio.get_running_loop().create_task(self._work())

    def feed(self, record: Record) -> None:
        """What comes while there is no process is lost to the trackers."""
        pipe = self._process.stdin if self._process else None
        if pipe is None or pipe.is_closing():
            return
        if pipe.transport.get_write_buffer_size() > LONGEST_BACKLOG:
            self._kill()
            return
        pipe.write(encode(record).encode() + b"\n")

    async def close(self, ending: Exit | None, *, within_s: float) -> None:
        """Tell how the attempt ended (None: another leader goes on), and let it finish."""
        self._closing = True
        if ending is not None:
            self.feed(ending)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        else:
            self._working.cancel()
        done, _ = await asyncio.wait([self._working], timeout=within_s)
        if not done:
            self._say(f"dtp: trackers: not finished after {within_s:g} s; their last rows are lost")
            self._kill()
            self._working.cancel()
            await asyncio.wait([self._working], timeout=1.0)

    # ------------------------------------------------------------------------------------ inside

    async def _work(self) -> None:
        for start in range(STARTS):
            code = await self._run(start)
            self._process = None
            if self._closing or code == 0:
                return
            more = start + 1 < STARTS
            what = "it is started again" if more else "nothing more is tracked"
            where = Path(self._launch.scratch, ERRORS_FILE)
            self._say(f"dtp: trackers: their process ended with {code}, see {where}; {what}")
            await asyncio.sleep(RETRY_S)

    async def _run(self, start: int) -> int:
        try:
            process = await self._start()
        except OSError as error:
            self._say(f"dtp: trackers: cannot be started: {error}")
            return 1
        assert process.stdin is not None
        told = about(self._launch, term=self._term, start=start)
        process.stdin.write(encode_about(told).encode() + b"\n")
        self._process = process
        if self._closing:
            process.stdin.close()
        try:
            await self._repeat(process)
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()

    async def _start(self) -> asyncio.subprocess.Process:
        """In a session of its own: what kills the agent leaves it the time to close its files."""
        with _errors_file(self._launch) as errors:
            return await asyncio.create_subprocess_exec(
                *COMMAND,
                cwd=self._launch.scratch,
                env=_environment(self._launch, os.environ),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    async def _repeat(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # a line beyond all measure
            async for line in process.stdout:
                self._say(f"dtp: {line.decode('utf-8', 'replace').rstrip()}")

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _errors_file(launch: Launch) -> IO[bytes]:
    return Path(launch.scratch, ERRORS_FILE).open("ab")


def _environment(launch: Launch, inherited: Mapping[str, str]) -> dict[str, str]:
    env = {**inherited, **launch.env, "OMP_NUM_THREADS": "1"}
    env.pop(Env.LAUNCH, None)
    return env
