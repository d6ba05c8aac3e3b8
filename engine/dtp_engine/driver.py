"""Who drives: the holder of the lease, and the background controller that the first client
starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import psutil

from dtp_engine.errors import InfrastructureError
from dtp_engine.ledger import Lease
from dtp_engine.settings import Settings

LOG_FILE = "controller.log"


@dataclass(frozen=True, slots=True)
class Driver:
    """Who drives, as the lease says."""

    holder: str | None
    """``host:pid:start-time``; None when nobody does."""
    alive: bool
    """It exists and renews its lease. False as well for a holder on another machine that only its
    lease can speak for."""
    beat_at: datetime | None
    log: Path
    silent: bool = False
    """It exists but has not renewed its lease in time: stopped, frozen, or starved."""


def holder_name(pid: int) -> str:
    """``host:pid:start-time`` of a process on this machine; a reused pid makes another name.

    Raises `psutil.NoSuchProcess`, for a dead process that nobody has waited for as well.
    """
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(pid)
    return f"{socket.gethostname()}:{pid}:{process.create_time():.2f}"


def pid_of(holder: str) -> int | None:
    """The pid of a holder on this machine that is alive; None for any other."""
    host, pid, _ = holder.rsplit(":", 2)
    if host != socket.gethostname():
        return None
    try:
        return int(pid) if holder_name(int(pid)) == holder else None
    except (psutil.Error, ValueError):
        return None


def is_alive(holder: str) -> bool | None:
    """None for a process of another machine: only its lease can speak for it."""
    if holder.rsplit(":", 2)[0] != socket.gethostname():
        return None
    return pid_of(holder) is not None


def driver_of(lease: Lease | None, settings: Settings, now: datetime) -> Driver:
    log = settings.home / LOG_FILE
    if lease is None or not lease.holder:
        return Driver(None, alive=False, beat_at=None, log=log)
    exists = pid_of(lease.holder) is not None
    silent = exists and now - lease.at > timedelta(seconds=settings.lease_ttl_s)
    return Driver(lease.holder, exists and not silent, lease.at, log, silent)


def start_controller(settings: Settings) -> int:
    """Start the background controller; the pid. It leaves at once when another one holds the lease.

    It gets a session of its own, so that neither a closed terminal nor Ctrl-C reaches it.
    """
    log = settings.home / LOG_FILE
    try:
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dtp_engine.controller"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                env={**os.environ, "DTP_HOME": str(settings.home)},
                start_new_session=True,
            )
    except OSError as error:
        raise InfrastructureError(f"cannot start the controller: {error}; see {log}") from error
    return process.pid


def stop_controller(driver: Driver) -> bool:
    """Ask the controller of this machine to leave; jobs train on. False when there is none.

    One that is silent would not hear it and is killed, which loses nothing.
    """
    pid = pid_of(driver.holder) if driver.holder else None
    if pid is None:
        return False
    os.kill(pid, signal.SIGKILL if driver.silent else signal.SIGTERM)
    return True
