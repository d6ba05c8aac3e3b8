"""A worker's agent: claims the worker, prepares it, takes its part in the gang, says how it ended.

``python -P -m dtp_trainer.agent`` with ``DTP_LAUNCH`` = path of the launch file. Beside that file
it makes ``claim`` (whoever made it is the worker; a second agent leaves at once) and, as its last
act, ``exit.json``. Stdout is the worker's log: records and text lines, see `wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtp_trainer.checkpoints.grace import RANKS_SHARE
from dtp_trainer.gang import election, links
from dtp_trainer.gang.candidate import Candidate
from dtp_trainer.gang.election import Led, Over, Vacant
from dtp_trainer.gang.member import Member
from dtp_trainer.gang.recorder import Recorder
from dtp_trainer.ranks.launcher import RankLauncher
from dtp_trainer.storage import Storage, StorageError, open_storage
from dtp_trainer.wire import Env, Exit, ExitCode, Launch
from dtp_trainer.worker import claims, steady
from dtp_trainer.worker.crew import warm_spec
from dtp_trainer.worker.hosts import HostSampler
from dtp_trainer.worker.lines import Lines
from dtp_trainer.worker.preparation import SetupFailed, run_setup

STALE_S = 5.0
"""A leader that cannot be reached is replaced once its ``gang.json`` stood still for so long."""
RETRY_S = 0.2
FAREWELL_S = 8.0
"""How long a leader may take to dismiss the others after its own worker was dismissed."""
CLAIM_CHECK_S = 2.0

log = logging.getLogger("dtp.agent")


@dataclass(frozen=True, slots=True)
class Ending:
    code: int
    reason: str


class Agent:
    """One worker, from its claim to its exit."""

    def __init__(self, launch: Launch, folder: Path, lines: Lines, launcher: RankLauncher) -> None:
        self._launch, self._lines, self._launcher = launch, lines, launcher
        self._folder = folder
        self._storage: Storage = open_storage(launch.storage)
        self._member = Member(launch, launcher=launcher, lines=lines)
        self._candidate = Candidate(
            launch,
            self._storage,
            record=lambda term: Recorder(launch, self._storage, term=term, lines=lines),
            complain=self._complain,
        )
        self._working: asyncio.Task[Ending] | None = None
        self._seen: tuple[str | None, float] = (None, steady.now())
        """The newest tag of ``gang.json`` and when it was first seen."""
        self._refused_at: str | None = None
        """The tag of ``gang.json`` when this worker was first refused at the leader's address."""
        self._storage_trouble = ""
        self._given_up = Ending(ExitCode.PAUSED, "left as asked, before it took part")
        self._farewell_s = FAREWELL_S

    async def run(self) -> Ending:
        """Work until dismissed, or until the grace after SIGTERM is over."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        sampler = HostSampler(
            self._launch.worker,
            roots=lambda: (os.getpid(), *self._member.rank_pids),
            deliver=lambda host: _soon(loop, lambda: self._member.sampled(host)),
            env={**os.environ, **self._launch.env},
        )
        sampler.start()
        self._working = loop.create_task(self._work())
        guarding = loop.create_task(self._guard_claim())
        try:
            return await self._working
        except asyncio.CancelledError:
            return self._given_up
        finally:
            guarding.cancel()
            sampler.stop()
            await self._candidate.retire(self._farewell_s)

    # ------------------------------------------------------------------------------------ stopping

    def _on_sigterm(self) -> None:
        if self._member.leaving:
            return
        self._member.leave()
        if not self._member.in_gang and self._working is not None:
            self._working.cancel()
            return
        loop = asyncio.get_running_loop()
        own_share_s = self._launch.grace_s * RANKS_SHARE
        loop.call_later(own_share_s, lambda: self._member.kill(late=True))
        loop.call_later(self._launch.grace_s, self._give_up)

    def _give_up(self) -> None:
        why = "left as asked; its leader did not let it go in time"
        self._drop_everything(Ending(ExitCode.PAUSED, why))

    async def _guard_claim(self) -> None:
        """A worker whose folder was removed belongs to no job, and nobody would ever stop it."""
        gone = False
        while not gone:
            await asyncio.sleep(CLAIM_CHECK_S)
            gone = await asyncio.to_thread(claims.is_gone, self._folder)
        self._member.kill()
        self._drop_everything(Ending(ExitCode.FENCED, "the folder of this worker was removed"))

    def _drop_everything(self, ending: Ending) -> None:
        self._given_up = ending
        self._farewell_s = 0.0
        if self._working is not None:
            self._working.cancel()

    # ------------------------------------------------------------------------------------- working

    async def _work(self) -> Ending:
        warming = asyncio.create_task(self._launcher.warm(warm_spec(self._launch)))
        try:
            await self._set_up()
            return await self._take_part()
        finally:
            warming.cancel()

    async def _set_up(self) -> None:
        """A failure is told to the gang: the others need not wait for this worker."""
        try:
            await run_setup(self._launch, self._lines)
        except SetupFailed as error:
            self._member.unfit = str(error)

    async def _take_part(self) -> Ending:
        """Find the leader, or become it; serve; and again whenever it is lost."""
        alone_since = steady.now()
        while True:
            ending, served = await self._serve_once()
            if ending is not None:
                return ending
            if self._member.leaving:
                return Ending(ExitCode.PAUSED, "left as asked, after its leader was lost")
            if served:
                alone_since = steady.now()
                continue
            if steady.now() - alone_since > self._launch.start_within_s:
                why = self._storage_trouble or "its leader cannot be reached"
                return Ending(ExitCode.NO_GANG, f"no gang: {why}")
            await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))

    async def _serve_once(self) -> tuple[Ending | None, bool]:
        """How it ended, if it did; and whether there is reason to try again at once."""
        try:
            sight = await asyncio.to_thread(election.look, self._storage)
        except StorageError as error:
            self._complain(error)
            return None, False
        if sight.tag != self._seen[0]:
            self._seen = (sight.tag, steady.now())
        match election.judge(sight.gang, self._launch.attempt):
            case Over(code, reason):
                return Ending(code, reason), True
            case Vacant():
                return None, await self._campaign(sight)
            case Led(address):
                return await self._join(address, sight)

    async def _join(self, address: str, sight: election.Sight) -> tuple[Ending | None, bool]:
        try:
            link = await links.connect(
                address, secret=self._launch.secret, scope=links.scope_of(self._launch)
            )
        except links.Vacated:
            return await self._succeed(sight)
        except links.Refused as error:
            # Whoever refuses may be another gang's leader, at a port that ours had before it died.
            if self._refused_at not in (None, sight.tag):
                return Ending(ExitCode.FENCED, f"the gang refused this worker: {error}"), True
            self._refused_at = sight.tag
            return await self._succeed_if_stale(sight)
        except (links.Unreachable, links.Impostor) as error:
            log.warning("%s", error)
            return await self._succeed_if_stale(sight)
        began_at = steady.now()
        dismissed = await self._member.serve(link)
        if dismissed is None:
            # A leader that is lost again and again must not be asked without a pause.
            return None, steady.now() - began_at > RETRY_S
        return Ending(dismissed.code, dismissed.reason), True

    async def _succeed_if_stale(self, sight: election.Sight) -> tuple[Ending | None, bool]:
        if steady.now() - self._seen[1] > STALE_S:
            return await self._succeed(sight)
        return None, False

    async def _succeed(self, sight: election.Sight) -> tuple[Ending | None, bool]:
        """Take a lost leader's place, unless this worker could not train."""
        if self._member.unfit:
            return Ending(ExitCode.SETUP_FAILED, self._member.unfit), True
        return None, await self._campaign(sight)

    async def _campaign(self, sight: election.Sight) -> bool:
        """Try to become leader; True when somebody leads now."""
        return await self._candidate.campaign(sight, unchanged_s=steady.now() - self._seen[1])

    def _complain(self, error: StorageError) -> None:
        if str(error) != self._storage_trouble:
            self._storage_trouble = str(error)
            log.warning("%s", error)


class _LogLines(logging.Handler):
    """Warnings of the agent are text lines of its worker."""

    def __init__(self, lines: Lines, source: str) -> None:
        super().__init__(logging.WARNING)
        self._lines, self._source = lines, source

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.say(self._source, f"dtp: {record.getMessage()}")


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """From another thread; nothing when the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


async def _live(launch: Launch, folder: Path, lines: Lines) -> Ending:
    zygotes = Path(launch.zygotes)
    async with RankLauncher(zygotes=zygotes, idle_s=launch.zygote_idle_s) as launcher:
        return await Agent(launch, folder, lines, launcher).run()


def _work(launch: Launch, folder: Path, lines: Lines) -> Ending:
    """A mistake of ours ends the worker with one line; the rest is in a file."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(lambda _, context: log.error("%s", _one_line(context)))
    try:
        return loop.run_until_complete(_live(launch, folder, lines))
    except Exception as error:  # noqa: BLE001 - the last one who can say why the worker ended
        with contextlib.suppress(OSError):
            (Path(launch.scratch) / "agent-error.txt").write_text(traceback.format_exc())
        return Ending(ExitCode.FAILED, f"the agent failed: {type(error).__name__}: {error}")


def _one_line(context: Mapping[str, Any]) -> str:
    error = context.get("exception")
    return f"{context['message']}: {error!r}" if error else str(context["message"])


def _read_launch(path: Path) -> Launch:
    """Raises `OSError`, `ValueError`, `TypeError`."""
    launch: Launch = Launch.from_dict(json.loads(path.read_bytes()))
    return launch


def _be_independent() -> None:
    """A terminal that closes, or Ctrl-C in it, is no business of a worker."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getpid() != os.getsid(0):
        with contextlib.suppress(OSError):  # a leader of a process group cannot begin a session
            os.setsid()


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until somebody can answer it
    path = Path(os.environ.get(Env.LAUNCH, ""))
    lines = Lines()
    try:
        launch = _read_launch(path)
        claimed = claims.take_claim(path.parent)
    except (OSError, ValueError, TypeError) as error:
        lines.say("agent", f"dtp: {Env.LAUNCH}={path} cannot be used: {error}")
        return ExitCode.SETUP_FAILED
    source = f"worker{launch.worker}"
    if not claimed:
        lines.say(source, "dtp: this worker was claimed before; a second agent leaves")
        return ExitCode.FENCED
    _be_independent()
    logging.getLogger("dtp").addHandler(_LogLines(lines, source))
    ending = _work(launch, path.parent, lines)
    ended = Exit(time.time(), launch.worker, ending.code, ending.reason)
    lines.record(ended)
    with contextlib.suppress(OSError):
        claims.write_exit(path.parent, ended)
    return ending.code


if __name__ == "__main__":
    # Not by way of the interpreter's end: that waits for every thread, however stuck its disk is.
    code = main()
    sys.stdout.flush()
    os._exit(code)
