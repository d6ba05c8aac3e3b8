"""The ranks of one worker in one generation: started, listened to, drained, killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from dtp_trainer.gang import blame
from dtp_trainer.gang.messages import Effort, RankExited, Start
from dtp_trainer.inspection import Ask
from dtp_trainer.ranks.launcher import RankError, RankProcess, RankSpec
from dtp_trainer.wire import RANKS_FOLDER, Launch, ProcessRecord, Window, encode_object
from dtp_trainer.worker.evidence import Evidence
from dtp_trainer.worker.folding import Folder, StepTail
from dtp_trainer.worker.launching import Launcher, let_go
from dtp_trainer.worker.lines import TAIL_LINES, Lines, pump
from dtp_trainer.worker.rank_env import ask_file, job_env, rank_env
from dtp_trainer.worker.toil import Toil

POLL_S = 0.2
WINDOW_S = 1.0
HEAD_START_S = 0.05
"""Of rank 0, which serves the store that the others connect to: torch waits half a second and more
after a connection that was refused."""
OUTPUT_S, OUTPUT_OF_FAILED_S = 2.0, 0.3
"""After a rank's end: how long the last lines of its output are waited for."""
DUMP_S = 0.5
"""How long ranks have to say where they stand before they are killed."""
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish"})
_NOT_STARTED = (126, 127)


class Crew:
    """`run` starts the ranks and returns when nothing of them is left.

    exited: called once a rank, at once, with how it ended. stepped: called with each new window.
    """

    def __init__(
        self,
        launch: Launch,
        order: Start,
        *,
        launcher: Launcher,
        lines: Lines,
        exited: Callable[[RankExited], None],
        stepped: Callable[[Window], None],
    ) -> None:
        self.order = order
        self._launch, self._launcher, self._lines = launch, launcher, lines
        self._exited, self._stepped = exited, stepped
        self._ranks: dict[int, RankProcess] = {}
        self._starts: set[asyncio.Future[RankProcess]] = set()
        self._killed = self._drained = self._late = False
        self.folder = Folder(launch.worker)
        self._toil = Toil()
        scratch = Path(launch.scratch)
        self._steps_folder = scratch / f"steps.g{order.generation:04d}"
        self._records = scratch / RANKS_FOLDER
        self._evidence = Evidence(launch.storage, order.generation, self._steps_folder)
        self._asking: asyncio.Task[None] | None = None
        self._tails = {rank: StepTail(self._steps_file(rank)) for rank in self.numbers}

    @property
    def numbers(self) -> range:
        """Global ranks."""
        first = self.order.first_rank
        return range(first, first + self._launch.nproc_per_node)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the ranks that run."""
        return tuple(r.pid for r in self._ranks.values() if r.exit is None)

    @property
    def reporting(self) -> bool:
        """The ranks opened their step files."""
        return bool(self.folder.last) or any(tail.opened for tail in self._tails.values())

    @property
    def steps(self) -> dict[str, int]:
        """Rank → last completed step, 0 before its first; of ranks that run."""
        alive = [rank for rank, process in self._ranks.items() if process.exit is None]
        return {str(rank): self.folder.last.get(rank, 0) for rank in alive}

    @property
    def reached(self) -> int:
        """The newest step that any of its ranks completed; 0 before the first."""
        return max(self.folder.last.values(), default=0)

    @property
    def effort(self) -> Effort | None:
        """Of rank 0, if it runs here and took a step."""
        return self._toil.effort

    async def run(self) -> None:
        """Raises `OSError` when the scratch folder cannot be written; no rank is left then."""
        self._steps_folder.mkdir(parents=True, exist_ok=True)
        self._records.mkdir(exist_ok=True)
        folding = asyncio.create_task(self._fold_always())
        try:
            await asyncio.gather(*(self._run_rank(rank) for rank in self.numbers))
        finally:
            folding.cancel()
            at_once = self._killed
            self.kill()
            for process in self._ranks.values():
                await process.wait()
            await let_go(self._launcher, at_once=at_once)
            await self._evidence.kept()
        self._fold()
        records = [self._records / f"{rank.pid}.json" for rank in self._ranks.values()]
        _remove_traces(self._steps_folder, records)

    def drain(self) -> None:
        """SIGTERM: checkpoint at the next step boundary and leave."""
        self._drained = True
        self._cancel_starts()
        for rank in self._ranks.values():
            if rank.exit is None:
                _ask_to_leave(rank.pid)

    def kill(self, *, dump: bool = False, late: bool = False) -> None:
        """SIGKILL. With `dump`, ranks first say where they stand, as far as Python can tell;
        `late`: they had their time to leave."""
        self._late = self._late or (late and not self._killed)
        self._killed = True
        self._cancel_starts()
        if dump:
            self._asking = asyncio.create_task(self._ask_and_kill())
            return
        for rank in self._ranks.values():
            rank.kill()

    async def _ask_and_kill(self) -> None:
        alive = {number: rank for number, rank in self._ranks.items() if rank.exit is None}
        await self._evidence.ask({number: _scripts(rank.pid) for number, rank in alive.items()})
        for rank in alive.values():
            if rank.exit is None:
                _dump(rank.pid)
        await asyncio.sleep(DUMP_S)
        self.kill()

    def pass_on(self, ask: Ask) -> None:
        """A client's wish, to those ranks that it is for. A disk that is full loses it."""
        for rank in filter(ask.wants, self.numbers):
            _leave(ask, ask_file(self._steps_file(rank)))

    def failed(self, why: str) -> RankExited:
        """What stands for the ranks of a crew that could not be run."""
        return replace(self._exit(self.order.first_rank, 1), error=why)

    # ------------------------------------------------------------------------------------ one rank

    async def _run_rank(self, rank: int) -> None:
        process = await self._start(rank)
        if process is None:
            return
        self._ranks[rank] = process
        self._record(process)
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        output = [
            asyncio.create_task(pump(process.stdout, self._lines, f"rank{rank}", "out")),
            asyncio.create_task(pump(process.stderr, self._lines, f"rank{rank}", "err", tail)),
        ]
        code = await process.wait()
        await asyncio.wait(output, timeout=OUTPUT_OF_FAILED_S if code else OUTPUT_S)
        self._read_steps()
        if self._evidence.wanted:
            self._evidence.keep(rank, tail)
        self._exited(self._exit_of(rank, process, code, tail))
        for task in output:
            task.cancel()
        await asyncio.wait(output)

    async def _start(self, rank: int) -> RankProcess | None:
        """None when it could not be started, or is not wanted any more; that is told."""
        if rank:
            await asyncio.sleep(HEAD_START_S)
        starting = asyncio.ensure_future(self._launcher.start(self._spec(rank)))
        self._starts.add(starting)
        if self._killed or self._drained:
            starting.cancel()
        await asyncio.wait([starting])
        self._starts.discard(starting)
        if starting.cancelled():
            self._exited(replace(self._exit(rank, -signal.SIGKILL), killed=True))
            return None
        try:
            return starting.result()
        except RankError as error:
            self._exited(replace(self._exit(rank, 127), error=str(error), unstartable=True))
            return None

    def _cancel_starts(self) -> None:
        """The first start of all may have to wait for long imports."""
        for starting in self._starts:
            starting.cancel()

    def _spec(self, rank: int) -> RankSpec:
        error_file = self._error_file(rank)
        error_file.parent.mkdir(parents=True, exist_ok=True)
        env = rank_env(
            self._launch,
            self.order,
            rank - self.order.first_rank,
            inherited=os.environ,
            steps_file=self._steps_file(rank),
            error_file=error_file,
        )
        return RankSpec(tuple(self._launch.command), env, self._launch.workdir)

    def _exit_of(self, rank: int, process: RankProcess, code: int, tail: deque[str]) -> RankExited:
        known = process.exit
        error = (known.error if known else None) or self._recorded_error(rank)
        if not error and code:
            error = blame.last_error(tail)
        killed = self._killed and code in (-signal.SIGKILL, -signal.SIGABRT)
        stands_in, waits = blame.stack([*tail]) if code < 0 else ("", False)
        return replace(
            self._exit(rank, code),
            error=error,
            killed=killed,
            late=killed and self._late,
            formed_group=bool(known and known.formed_group),
            stands_in=stands_in,
            waits=waits,
            unstartable=code in _NOT_STARTED and not self.folder.last,
        )

    def _exit(self, rank: int, code: int) -> RankExited:
        step = self.folder.last.get(rank, 0)
        return RankExited(self.order.generation, rank, code, step)

    def _recorded_error(self, rank: int) -> str:
        """What ``torch.distributed.elastic``'s `record` left."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found: Any = json.loads(self._error_file(rank).read_text())
            message = found.get("message", "")
            text = message.get("message", "") if isinstance(message, Mapping) else message
            return str(text).strip().splitlines()[0][:300] if text else ""
        return ""

    # --------------------------------------------------------------------------------------- steps

    async def _fold_always(self) -> None:
        loop = asyncio.get_running_loop()
        folded_at = 0.0
        while True:
            self._read_steps()
            if loop.time() - folded_at >= WINDOW_S and self._fold():
                folded_at = loop.time()
            await asyncio.sleep(POLL_S)

    def _read_steps(self) -> None:
        for tail in self._tails.values():
            steps = tail.read()
            self.folder.add(steps)
            self._toil.add(steps)

    def _fold(self) -> bool:
        window = self.folder.fold()
        if window is not None:
            self._stepped(window)
        return window is not None

    # --------------------------------------------------------------------------------------- files

    def _steps_file(self, rank: int) -> Path:
        return self._steps_folder / f"rank-{rank:05d}.jsonl"

    def _error_file(self, rank: int) -> Path:
        return self._steps_folder / f"rank-{rank:05d}.error.json"

    def _record(self, process: RankProcess) -> None:
        """So that what this worker leaves behind, should it be killed, can be found."""
        with contextlib.suppress(OSError):
            record = ProcessRecord(process.pid, process.start_time)
            (self._records / f"{process.pid}.json").write_bytes(encode_object(record))


def warm_spec(launch: Launch) -> RankSpec:
    """Enough of a rank for the launcher to make its warm process ready."""
    return RankSpec(tuple(launch.command), job_env(launch, os.environ), launch.workdir)


def _remove_traces(steps_folder: Path, records: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in records:
            path.unlink(missing_ok=True)
        for file in steps_folder.iterdir():
            file.unlink()
        steps_folder.rmdir()


def _leave(ask: Ask, path: Path) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        unfinished.write_text(json.dumps(ask.to_dict()))
        unfinished.rename(path)


def _ask_to_leave(pid: int) -> None:
    """To the script itself: a shell would die of the signal and leave its script an orphan, and
    the processes that a script started (loaders of data) are its own to end."""
    for number in _scripts(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(number, signal.SIGTERM)


def _dump(pid: int) -> None:
    """SIGABRT: `faulthandler`, enabled in every rank that is Python, writes its stack to stderr."""
    for number in _scripts(pid):
        with contextlib.suppress(OSError):
            # One byte, and not none: only that keeps a handler of core files from being started.
            resource.prlimit(number, resource.RLIMIT_CORE, (1, 1))
            os.kill(number, signal.SIGABRT)


def _scripts(pid: int) -> list[int]:
    try:
        process = psutil.Process(pid)
        if process.name() not in _SHELLS:
            return [pid]
        children = [number for child in process.children() for number in _scripts(child.pid)]
    except psutil.Error:
        return [pid]
    return children or [pid]
