"""The ranks of one worker under torchrun's own elastic agent, one torchrun a generation.

Its known faults are worked around by leaving it nothing to agree about: the gang has formed the
generation, so the rendezvous is static, at a fresh port, and without restarts. What torchrun's
exit code cannot tell (a pause from a crash, which rank was first) each rank says by itself
(`under_torchrun.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dtp_trainer.ranks import under_torchrun
from dtp_trainer.ranks.launcher import RankError, RankLauncher
from dtp_trainer.ranks.process import RankExit, RankProcess, RankSpec

FORM_WITHIN_S = 60
LEAVE_S = 3.0
"""After its last rank: torchrun waits for those on other workers, whose store it may hold."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker's torchrun stands in a generation."""

    nnodes: int
    node_rank: int
    nproc: int
    master_addr: str
    master_port: int
    run_id: str


@dataclass(slots=True)
class _Ward:
    """A rank that torchrun starts for us."""

    output: tuple[asyncio.StreamReader, asyncio.StreamReader]
    held: list[int]
    """Write ends of its pipes, so that they do not end before it began."""
    started: asyncio.Future[RankProcess]
    ending: asyncio.Future[RankExit]
    transports: list[asyncio.BaseTransport] = field(default_factory=list)

    def ended(self, found: RankExit) -> None:
        while self.held:
            os.close(self.held.pop())
        if not self.ending.done():
            self.ending.set_result(found)


class TorchrunRanks:
    """In the place of a `RankLauncher` for the ranks of one generation; `aclose` ends them.

    folder: a new one, for its pipes and files. `start` is called once for each rank.
    """

    def __init__(self, launcher: RankLauncher, place: Place, folder: Path) -> None:
        self._launcher, self._place, self._folder = launcher, place, folder
        self._wards: dict[int, _Ward] = {}
        self._specs: dict[int, RankSpec] = {}
        self._torchrun: RankProcess | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._news: asyncio.BaseTransport | None = None
        self._news_end = -1
        self._last_words = ""
        self._closed = False
        self._preparing = asyncio.Lock()

    async def start(self, spec: RankSpec) -> RankProcess:
        """The rank, once torchrun has started it. torchrun itself starts with the last of them.
        Raises `RankError`."""
        number = int(spec.env["LOCAL_RANK"])
        try:
            async with self._preparing:
                ward = self._wards[number] = await self._prepare(number, spec)
        except OSError as error:
            raise RankError(f"cannot prepare {self._folder}: {error.strerror}") from error
        self._specs[number] = spec
        if len(self._specs) == self._place.nproc and not self._closed:
            await self._start_torchrun()
        return await asyncio.shield(ward.started)

    async def aclose(self, *, at_once: bool) -> None:
        """Until nothing of it is left."""
        self._closed = True
        if self._torchrun is not None:
            waiting = asyncio.ensure_future(self._torchrun.wait())
            await asyncio.wait([waiting], timeout=0.0 if at_once else LEAVE_S)
            self._torchrun.kill()
            await waiting
        for task in self._tasks:
            task.cancel()
        self._lose_all()
        self._close_pipes()

    def command(self, argv: Sequence[str]) -> tuple[str, ...]:
        """torchrun's, for a rank's own command."""
        place = self._place
        options = {
            "nnodes": place.nnodes,
            "node-rank": place.node_rank,
            "nproc-per-node": place.nproc,
            "rdzv-backend": "static",
            "rdzv-id": place.run_id,
            "rdzv-conf": f"timeout={FORM_WITHIN_S}",
            "master-addr": place.master_addr,
            "master-port": place.master_port,
            "max-restarts": 0,
            "monitor-interval": 0.1,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        rank = (sys.executable, "-P", "-m", "dtp_trainer.ranks.under_torchrun", *argv)
        return (sys.executable, "-m", "torch.distributed.run", *words, "--no-python", *rank)

    async def _prepare(self, number: int, spec: RankSpec) -> _Ward:
        loop = asyncio.get_running_loop()
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._news is None:
            os.mkfifo(self._folder / under_torchrun.NEWS)
            reader, self._news, self._news_end = await _open(self._folder / under_torchrun.NEWS)
            self._spawn(self._listen(reader))
        path = under_torchrun.environment_of(self._folder, number)
        path.write_text(json.dumps(dict(spec.env)))
        path.chmod(0o600)
        ward = _Ward((asyncio.StreamReader(),) * 2, [], loop.create_future(), loop.create_future())
        readers = []
        for stream in ("out", "err"):
            pipe = under_torchrun.output_of(self._folder, number, stream)
            os.mkfifo(pipe)
            reader, transport, held = await _open(pipe)
            readers.append(reader)
            ward.transports.append(transport)
            ward.held.append(held)
        ward.output = (readers[0], readers[1])
        return ward

    async def _start_torchrun(self) -> None:
        spec = self._specs[0]
        own = under_torchrun.FROM_TORCHRUN
        env = {name: value for name, value in spec.env.items() if name not in own}
        env[under_torchrun.FOLDER] = str(self._folder)
        ordered = RankSpec(self.command(spec.argv), env, spec.cwd)
        try:
            self._torchrun = await self._launcher.start(ordered)
        except RankError as error:
            self._last_words = str(error)
            self._lose_all()
            raise
        for reader in (self._torchrun.stdout, self._torchrun.stderr):
            self._spawn(self._drain(reader))
        self._spawn(self._await_end(self._torchrun))

    async def _await_end(self, torchrun: RankProcess) -> None:
        await torchrun.wait()
        with contextlib.suppress(OSError):  # It comes after all that the ranks have said.
            os.write(self._news_end, b'{"over": true}\n')

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            with contextlib.suppress(ValueError, KeyError):
                self._hear(json.loads(line))

    def _hear(self, news: dict[str, Any]) -> None:
        if "over" in news:
            self._lose_all()
            return
        ward = self._wards[news["rank"]]
        if not ward.started.done():
            at = 0.0
            with contextlib.suppress(psutil.Error):
                at = psutil.Process(news["pid"]).create_time()
            ward.started.set_result(RankProcess(news["pid"], at, ward.output, ward.ending))
        if "code" in news:
            ward.ended(RankExit(news["code"], None, None))

    def _lose_all(self) -> None:
        """Ranks that did not say how they ended were killed with their torchrun; those that never
        began failed with it."""
        for ward in self._wards.values():
            if ward.started.done():
                if ward.started.exception() is None:
                    ward.started.result().kill()
                ward.ended(RankExit(-signal.SIGKILL, None, None))
            elif self._torchrun is None:
                ward.started.set_exception(RankError(self._last_words or "torchrun cannot start"))
                ward.started.exception()  # marks it as seen: nobody may be waiting
            elif not ward.started.done():
                ward.ended(RankExit(1, None, self._last_words or "torchrun ended"))
                pid, at = self._torchrun.pid, self._torchrun.start_time
                ward.started.set_result(RankProcess(pid, at, ward.output, ward.ending))

    async def _drain(self, reader: asyncio.StreamReader) -> None:
        """What torchrun says by itself mostly repeats what its ranks have said."""
        while line := await reader.read(1 << 16):
            words = line.decode(errors="replace").split("\n")
            said = [word.strip() for word in words if word.strip()]
            self._last_words = said[-1] if said else self._last_words

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _close_pipes(self) -> None:
        if self._news is not None:
            self._news.close()
            os.close(self._news_end)
        for ward in self._wards.values():
            for transport in ward.transports:
                transport.close()
        shutil.rmtree(self._folder, ignore_errors=True)


async def _open(path: Path) -> tuple[asyncio.StreamReader, asyncio.BaseTransport, int]:
    """A reader of a named pipe, and its write end, which keeps it open."""
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    held = os.open(path, os.O_WRONLY)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
    )
    return reader, transport, held
