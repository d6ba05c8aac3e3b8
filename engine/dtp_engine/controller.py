"""The loop that drives: lease, observe, decide, record, do. Any process may run it, one at a time.

``python -P -m dtp_engine.controller`` is the background controller of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import assert_never

from dtp_engine.admission import Admission, admit
from dtp_engine.backend import Backend, Capacity, CapacityRequest, Gang, LaunchPlan
from dtp_engine.backends import open_parts
from dtp_engine.clock import Clock, RealClock
from dtp_engine.decision import Action, Decision, Launch, Provision, Sight, Stop
from dtp_engine.driver import holder_name
from dtp_engine.errors import DtpError, LeaseLost, LedgerError
from dtp_engine.jobs import Attempt, AttemptId, Event, Job, PlacementState, Request
from dtp_engine.lease import LeaseKeeper
from dtp_engine.ledger import Change, Lease, Ledger
from dtp_engine.lifecycle import decide
from dtp_engine.room import Rooms, in_order
from dtp_engine.settings import Settings, load_settings

_log = logging.getLogger(__name__)

REPEAT_AFTER_S = 5.0
"""An action that is still due so long after it was done is done again: a call may get lost."""
LOOK_AFTER_S = 0.5
"""Workers tell nobody when they change; so they are looked at this often while a job is active."""
POLL_S = 0.05
"""How often the ledger is asked whether a client wrote to it."""
PID_FILE = "controller.pid"


@dataclass(frozen=True, slots=True)
class Case:
    """One job in one sweep."""

    read: Job
    """As the ledger holds it."""
    wanted: Job
    """With the intents of the requests that arrived."""
    attempt: Attempt | None
    admissions: tuple[Admission, ...]

    @property
    def placed(self) -> Attempt | None:
        """The newest attempt, unless it has ended."""
        return self.attempt if self.attempt and self.attempt.ended_at is None else None


@dataclass(frozen=True, slots=True)
class Look:
    """What the backend showed of all attempts."""

    gangs: Mapping[AttemptId, Gang] = field(default_factory=dict)
    trouble: str = ""
    """Why it showed nothing."""


class Controller:
    """One candidate for driving one ledger and one backend.

    All it keeps may be lost at any moment: the next controller reads the same ledger, sees the same
    backend and goes on.
    """

    def __init__(self, ledger: Ledger, backend: Backend, clock: Clock, keeper: LeaseKeeper) -> None:
        self._ledger = ledger
        self._backend = backend
        self._clock = clock
        self._keeper = keeper
        self._done_at: dict[tuple[AttemptId, Action], float] = {}
        self._wrong: dict[str, str] = {}
        """What is wrong at the moment, by subject."""

    async def sweep(self) -> bool:
        """Look at everything once and do what follows. True while a job is active.

        Raises `LeaseLost` when another controller drives, `LedgerError`.
        """
        await self._lease()
        cases = await self._read_cases()
        look = await self._observe([case.placed.id for case in cases if case.placed])
        rooms = Rooms(await self._capacity() if cases else None)
        for case in cases:
            rooms.reserve(case.wanted, _uncounted(case, look))
        stored = [await self._settle(case, look, rooms) for case in cases]
        return any(job.active for job in stored)

    async def drive(self, stopping: asyncio.Event, *, idle_s: float) -> None:
        """Until asked to stop, or idle for so long, or another living process drives.

        Raises `LedgerError` when the ledger refuses every call for so long.
        """
        while not stopping.is_set():
            try:
                await self._drive(stopping, idle_s)
            finally:
                await self._keeper.release()
            # A client writes first and then looks whether anybody drives; so one of us sees it.
            if self._keeper.others_drive or not await self._ledger.pending():
                return

    async def _drive(self, stopping: asyncio.Event, idle_s: float) -> None:
        busy_at = self._clock.monotonic()
        while not stopping.is_set():
            now = self._clock.monotonic()
            try:
                revision = await self._ledger.revision()
                active = await self._try_to_sweep()
                busy_at = now if active else busy_at
                if self._keeper.others_drive or now - busy_at > idle_s:
                    return
                await self._rest(revision, stopping, LOOK_AFTER_S if active else idle_s)
                self._wrong.pop("the ledger", None)
            except LedgerError as error:
                self._warn("the ledger", str(error))
                if now - busy_at > idle_s:
                    raise
                await self._clock.sleep(LOOK_AFTER_S)

    async def _try_to_sweep(self) -> bool:
        try:
            return await self.sweep()
        except LeaseLost as error:
            _log.debug("%s", error)
            self._keeper.lose()
            return False

    async def _rest(self, revision: int, stopping: asyncio.Event, at_most_s: float) -> None:
        """Until the ledger moved, the lease wants renewal, or so long."""
        until = min(self._clock.monotonic() + at_most_s, self._keeper.renew_at)
        while not stopping.is_set():
            await self._clock.sleep(POLL_S)
            if self._clock.monotonic() >= until or await self._ledger.revision() != revision:
                return

    # -------------------------------------------------------------------------------- observe

    async def _read_cases(self) -> list[Case]:
        """Those that get room first come first."""
        requests = await self._ledger.pending()
        jobs = {job.id: job for job in await self._ledger.jobs(active_only=True)}
        for job_id in {request.job_id for request in requests} - set(jobs):
            if (job := await self._ledger.job(job_id)) is not None:
                jobs[job_id] = job
        attempts = await self._ledger.attempts(list(jobs)) if jobs else []
        newest = {attempt.job_id: attempt for attempt in attempts}
        cases = [self._case(job, newest.get(job.id), requests) for job in jobs.values()]
        by_id = {case.read.id: case for case in cases}
        return [by_id[job.id] for job in in_order(case.wanted for case in cases)]

    def _case(self, job: Job, attempt: Attempt | None, requests: Sequence[Request]) -> Case:
        wanted, admissions = job, []
        for request in requests:
            if request.job_id == job.id:
                admission = admit(wanted, request, self._clock.now())
                wanted = admission.job
                admissions.append(admission)
        return Case(job, wanted, attempt, tuple(admissions))

    async def _observe(self, attempts: Sequence[AttemptId]) -> Look:
        if not attempts:
            return Look()
        try:
            look = Look(await self._backend.observe(attempts))
        except DtpError as error:
            self._warn("the backend", str(error))
            return Look(trouble=str(error))
        self._wrong.pop("the backend", None)
        return look

    async def _capacity(self) -> Capacity | None:
        try:
            capacity = await self._backend.capacity()
        except DtpError as error:
            self._warn("the capacity", str(error))
            return None
        self._wrong.pop("the capacity", None)
        return capacity

    def _warn(self, subject: str, text: str) -> None:
        """Logged when it begins, and not again for as long as it lasts."""
        if self._wrong.get(subject) != text:
            _log.warning("%s: %s", subject, text)
            self._wrong[subject] = text

    # ----------------------------------------------------------------------- decide, record, do

    async def _settle(self, case: Case, look: Look, rooms: Rooms) -> Job:
        """Decide for one job, record it, do it. What goes wrong with one stays with it."""
        lease = await self._lease()
        decision = self._decide(case, look, rooms)
        stored = await self._record(lease, case, decision)
        try:
            for action in decision.actions:
                await self._do_once(action, decision)
        except DtpError as error:
            self._warn(_acting(stored), str(error))
        except Exception as error:  # noqa: BLE001 - one broken job must not stop the others
            self._break_down(_acting(stored), error)
        else:
            self._wrong.pop(_acting(stored), None)
        return stored

    def _break_down(self, subject: str, error: Exception) -> None:
        text = f"internal error: {error!r}; see the controller's log"
        if self._wrong.get(subject) != text:
            _log.error("%s", subject, exc_info=error)
        self._wrong[subject] = text

    async def _lease(self) -> Lease:
        """Renewed between jobs as well, so that a long sweep keeps it."""
        lease = await self._keeper.hold()
        if lease is None:
            raise LeaseLost("another controller drives")
        return lease

    def _decide(self, case: Case, look: Look, rooms: Rooms) -> Decision:
        placed = case.placed
        sight = Sight(
            now=self._clock.now(),
            room=rooms.offer(case.wanted, present=len(placed.staying) if placed else 0),
            gang=look.gangs.get(placed.id) if placed else None,
            trouble=look.trouble,
            secret=secrets.token_hex(16),
        )
        try:
            decision = decide(case.wanted, case.attempt, sight)
            self._wrong.pop(_deciding(case.read), None)
        except Exception as error:  # noqa: BLE001 - one broken job must not stop the others
            self._break_down(_deciding(case.read), error)
            decision = Decision(case.wanted, case.attempt, (), ())
        rooms.reserve(case.wanted, _planned(decision.attempt) - _planned(case.placed))
        wrong = self._wrong.get(_deciding(case.read)) or self._wrong.get(_acting(case.read))
        return _tell(decision, wrong, case.read, sight.now) if wrong else decision

    async def _record(self, lease: Lease, case: Case, decision: Decision) -> Job:
        """One commit, and none when nothing changed."""
        changed = decision.attempt
        asked = tuple(a.event for a in case.admissions if a.event is not None)
        change = Change(
            job=decision.job,
            attempts=() if changed is None or changed == case.attempt else (changed,),
            events=_earliest_first(asked + decision.events),
            answered=tuple(admission.answer for admission in case.admissions),
        )
        if change == Change(case.read):
            return case.read
        return await self._ledger.commit(lease, change)

    async def _do_once(self, action: Action, decision: Decision) -> None:
        """What this controller did a moment ago it does not do again."""
        job, attempt = decision.job, decision.attempt
        subject = AttemptId(job.id, attempt.number if attempt else 0)
        now = self._clock.monotonic()
        if now - self._done_at.get((subject, action), -REPEAT_AFTER_S) < REPEAT_AFTER_S:
            return
        await self._do(action, job, attempt)
        self._done_at = {k: at for k, at in self._done_at.items() if now - at < REPEAT_AFTER_S}
        self._done_at[subject, action] = now

    async def _do(self, action: Action, job: Job, attempt: Attempt | None) -> None:
        match action:
            case Provision(workers):
                number = job.attempt if attempt and attempt.ended_at is None else job.attempt + 1
                wanted = CapacityRequest(AttemptId(job.id, number), workers, job.spec.resources)
                await self._backend.provision(wanted)
            case Launch(workers):
                assert attempt is not None
                await self._backend.launch(launch_plan(job, attempt, workers))
            case Stop(workers, grace):
                assert attempt is not None
                await self._backend.stop(attempt.id, workers, grace=grace)
            case _:
                assert_never(action)


def launch_plan(job: Job, attempt: Attempt, workers: tuple[int, ...]) -> LaunchPlan:
    """The same for every worker of an attempt, whoever launches it and however often."""
    limit = job.spec.max_duration
    left = None if limit is None else limit - timedelta(seconds=job.trained_s)
    return LaunchPlan(
        attempt=attempt.id,
        job_name=job.name,
        spec=job.spec,
        workers=workers,
        wished=len(attempt.staying),
        secret=attempt.secret,
        errors_left=max(job.spec.retry.on_errors - job.errors_used, 0),
        hangs_left=max(job.spec.retry.on_hang - job.hangs_used, 0),
        resume_from=job.resume_from,
        train_until=None if left is None else attempt.created_at + left,
    )


def _earliest_first(events: tuple[Event, ...]) -> tuple[Event, ...]:
    """What the gang told is older than what follows from it. Its clock may differ from ours, so
    times are not compared."""
    return tuple(sorted(events, key=lambda event: event.actor != "gang"))


def _deciding(job: Job) -> str:
    return f"deciding for job {job.id}"


def _acting(job: Job) -> str:
    return f"acting for job {job.id}"


def _planned(attempt: Attempt | None) -> int:
    return len(attempt.placements) if attempt else 0


def _uncounted(case: Case, look: Look) -> int:
    """Workers that are recorded, but that the backend does not know and so does not count."""
    if case.placed is None:
        return 0
    gang = look.gangs.get(case.placed.id)
    known = gang.workers if gang else {}
    planned = (p for p in case.placed.placements if p.state is PlacementState.PLANNED)
    return sum(placement.worker not in known for placement in planned)


def _tell(decision: Decision, trouble: str, before: Job, now: datetime) -> Decision:
    """What went wrong stays beside the detail for as long as it does; the timeline has it once."""
    job = decision.job
    if job.state.final:
        return decision
    told = Event(0, now, job.id, job.attempt, "controller", "trouble", trouble)
    if trouble not in job.detail:
        job = replace(job, detail=f"{job.detail}; {trouble}" if job.detail else trouble)
    events = decision.events if trouble in before.detail else (*decision.events, told)
    return replace(decision, job=job, events=events)


# ------------------------------------------------------------------------- the background process


async def run(settings: Settings, clock: Clock | None = None) -> int:
    """Drive until SIGTERM, SIGINT or a long idleness; returns the exit code of the process."""
    clock = clock or RealClock()
    settings.home.mkdir(parents=True, exist_ok=True)
    parts = await open_parts(settings)
    holder = holder_name(os.getpid())
    keeper = LeaseKeeper(parts.ledger, clock, holder, ttl_s=settings.lease_ttl_s)
    try:
        await keeper.hold()
        if keeper.others_drive:
            _log.info("another controller drives")
            return 0
        controller = Controller(parts.ledger, parts.backend, clock, keeper)
        with _pid_file(settings.home / PID_FILE, holder):
            await controller.drive(_stopped_by_signals(), idle_s=settings.controller_idle_s)
        _log.info("leaving; jobs train on")
        return 0
    finally:
        await parts.backend.aclose()
        await parts.ledger.aclose()


def main() -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        return asyncio.run(run(load_settings()))
    except DtpError as error:
        _log.error("%s", error)
        return error.exit_code
    except Exception:  # noqa: BLE001 - the last resort of a process that nobody watches
        _log.exception("the controller failed; the next client starts another")
        return 1


def _stopped_by_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def leave(name: str) -> None:
        _log.info("asked to leave by %s", name)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave, number.name)
    return stopping


@contextlib.contextmanager
def _pid_file(path: Path, holder: str) -> Iterator[None]:
    """For people and scripts; who drives is said by the lease, so a full disk is no matter."""
    host, pid, started = holder.rsplit(":", 2)
    text = json.dumps({"host": host, "pid": int(pid), "started": float(started)}) + "\n"
    with contextlib.suppress(OSError):
        path.write_text(text)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main())
