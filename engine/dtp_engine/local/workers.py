"""One worker as a process of this machine: begun once, looked at, stopped, and buried when nothing
of it runs any more. Blocking.

Who is the worker is decided by its claim: the first process that makes the file ``claim`` in the
worker's folder. So a launch may be repeated after a crash (the second process finds the claim and
leaves), and a worker is cancelled before it begins by making the claim in its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence

from dtp_engine.backend import Liveness, WorkerSight
from dtp_engine.local import processes
from dtp_engine.local.folders import WorkerFolder, read_json, write_bytes, write_json
from dtp_engine.local.processes import CHILDREN, Process
from dtp_trainer import wire

NOBODY = wire.ProcessRecord(pid=0, start_time=0.0)
"""The claim of a worker that was stopped before it began."""

KILL_SLACK_S = 2.0
"""An agent keeps to its grace by itself and then writes how it ended; only one that did not is
killed."""
LINGER_S = 10.0
"""How long an agent may run on after it wrote its exit."""
_STRAGGLERS_END_WITHIN_S = 0.5


def begin(
    folder: WorkerFolder, launch: wire.Launch, agent: Sequence[str], env: Mapping[str, str]
) -> None:
    """Start the agent unless this worker exists or existed. Raises `OSError`."""
    if folder.claim.exists() or folder.spawned.exists():
        return
    folder.create()
    folder.scratch.mkdir(mode=0o700, exist_ok=True)
    write_bytes(folder.launch, wire.encode_object(launch))
    with folder.log.open("ab", buffering=0) as log:
        process = subprocess.Popen(
            agent,
            cwd=folder.path,
            env={**env, wire.Env.LAUNCH: str(folder.launch)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    CHILDREN.add(process)
    seen = processes.find(process.pid)
    record = wire.ProcessRecord(process.pid, seen.start_time if seen else time.time())
    write_bytes(folder.spawned, wire.encode_object(record))


def refuse(folder: WorkerFolder, code: wire.ExitCode, reason: str) -> None:
    """Let the worker end with `code` without ever beginning."""
    folder.create()
    if folder.take_claim(NOBODY):
        ended = wire.Exit(at=time.time(), worker=folder.worker, code=code, reason=reason)
        write_bytes(folder.exit, wire.encode_object(ended))


def look(folder: WorkerFolder) -> WorkerSight | None:
    """None for one that was not launched yet. EXITED only once nothing of it runs any more: what a
    dead agent left behind is killed. Raises `OSError`."""
    gone = read_json(folder.gone)
    if gone:
        return WorkerSight(Liveness.EXITED, gone.get("code"), detail=str(gone.get("detail", "")))
    agent = find_agent(folder)
    if agent is not None:
        _end_lingering(folder)
        return WorkerSight(Liveness.ALIVE, host=_host())
    if not folder.claim.exists():
        if not folder.spawned.exists():
            return None
        if not folder.take_claim(NOBODY):  # claimed this very moment, by another than we spawned
            return WorkerSight(Liveness.ALIVE, host=_host())
    elif _is_being_claimed(folder):
        return WorkerSight(Liveness.ALIVE, host=_host())
    return _bury(folder)


def stop(folder: WorkerFolder, grace_s: float) -> None:
    """SIGTERM at the first call, SIGKILL at the first one after the grace; a worker that did not
    begin never will. Raises `OSError`."""
    if folder.gone.exists():
        return
    folder.create()
    if folder.take_claim(NOBODY):
        _signal_unclaimed(folder)
        return
    asked_at = read_json(folder.stopping).get("monotonic")
    if grace_s <= 0 or (asked_at and time.monotonic() > asked_at + grace_s + KILL_SLACK_S):
        _signal(folder, signal.SIGKILL)
    elif asked_at is None:
        _signal(folder, signal.SIGTERM)
        write_json(folder.stopping, {"monotonic": time.monotonic()})


def find_agent(folder: WorkerFolder) -> Process | None:
    """The living agent: the process that claimed the worker, or the one started to do so."""
    record = folder.read_record(folder.claim) or folder.read_record(folder.spawned)
    process = processes.find(record.pid) if record else None
    return process if process and record and _is_agent(process, record, folder) else None


def stragglers(folder: WorkerFolder) -> Iterator[Process]:
    """What still runs of a worker: processes that carry its name in their environment, and ranks
    (with their process groups) that its agent recorded."""
    launch = read_json(folder.launch)
    if not launch:
        return
    groups = {record.pid for record in folder.rank_records() if _is_rank(record)}
    for process in processes.everything():
        if process.pid == os.getpid():
            continue
        recorded = process.group in groups or process.pid in groups
        if recorded or (_is_marked(process, folder, launch) and not _is_shared(process)):
            yield process


def _bury(folder: WorkerFolder) -> WorkerSight:
    deadline = time.monotonic() + _STRAGGLERS_END_WITHIN_S
    while left := list(stragglers(folder)):
        for process in left:
            processes.send(process.pid, signal.SIGKILL, unless=_other_than(process))
        if time.monotonic() > deadline:
            numbers = ", ".join(str(process.pid) for process in left)
            return WorkerSight(Liveness.ALIVE, detail=f"waits for process {numbers} to end")
        time.sleep(0.01)
    CHILDREN.reap()
    code, detail = _ending(folder)
    write_json(folder.gone, {"code": code, "detail": detail, "at": time.time()})
    return WorkerSight(Liveness.EXITED, code, detail=detail, host=_host())


def _ending(folder: WorkerFolder) -> tuple[int | None, str]:
    said = read_json(folder.exit)
    if isinstance(said.get("code"), int):
        return said["code"], str(said.get("reason", ""))
    claim = folder.read_record(folder.claim)
    spawned = folder.read_record(folder.spawned)
    if claim == NOBODY and spawned is None:
        return wire.ExitCode.FENCED, "stopped before it began"
    record = spawned if claim in (None, NOBODY) else claim
    code = CHILDREN.code(record.pid) if record else None
    if claim == NOBODY:
        return code, f"did not begin: {_last_line(folder) or 'no word in its log'}"
    how = signal.Signals(code - 128).name if code and 128 < code < 193 else "no word of its exit"
    return code, f"the worker's agent died: {how}"


def _last_line(folder: WorkerFolder) -> str:
    with contextlib.suppress(OSError), folder.log.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
        lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
    return ""


def _end_lingering(folder: WorkerFolder) -> None:
    with contextlib.suppress(FileNotFoundError):
        if time.time() > folder.exit.stat().st_mtime + LINGER_S:
            _signal(folder, signal.SIGKILL)


def _signal(folder: WorkerFolder, number: signal.Signals) -> None:
    agent = find_agent(folder)
    if agent is not None:
        processes.send(agent.pid, number, unless=_other_than(agent))


def _signal_unclaimed(folder: WorkerFolder) -> None:
    """It has done nothing yet, and would only find the claim taken."""
    record = folder.read_record(folder.spawned)
    if record is not None:
        processes.send(
            record.pid, signal.SIGKILL, unless=lambda found: not _is_agent(found, record, folder)
        )


def _is_being_claimed(folder: WorkerFolder) -> bool:
    """A claim appears empty and is filled at once, unless its maker died in between."""
    if folder.read_record(folder.claim) is not None:
        return False
    return time.time() < folder.claim.stat().st_mtime + LINGER_S


def _is_agent(process: Process, record: wire.ProcessRecord, folder: WorkerFolder) -> bool:
    """By its start, or by its environment: the first moves when the clock is set, the second
    cannot always be read."""
    return process.started_at(record.start_time) or (
        process.env.get(wire.Env.LAUNCH) == str(folder.launch)
    )


def _is_rank(record: wire.ProcessRecord) -> bool:
    found = processes.find(record.pid)
    return found is not None and found.started_at(record.start_time)


def _is_marked(process: Process, folder: WorkerFolder, launch: Mapping[str, object]) -> bool:
    env = process.env
    if env.get(wire.Env.LAUNCH) == str(folder.launch):
        return True
    marks = {
        wire.Env.STORAGE: "storage",
        wire.Env.JOB_ID: "job_id",
        wire.Env.ATTEMPT: "attempt",
        wire.Env.WORKER: "worker",
    }
    return all(env.get(name) == str(launch.get(field)) for name, field in marks.items())


def _is_shared(process: Process) -> bool:
    """A warm process serves other jobs too, whoever started it."""
    return "dtp_trainer.ranks.zygote" in process.command


def _other_than(seen: Process) -> processes.Doubt:
    return lambda found: found.start_time != seen.start_time


def _host() -> str:
    return os.uname().nodename
