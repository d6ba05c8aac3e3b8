"""A whole dtp in a folder of its own: real commands, real controller, real workers; nothing is
left behind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


class Dtp:
    """The `dtp` command over one state folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {
            **os.environ,
            "DTP_HOME": str(home),
            "DTP_CONTROLLER_IDLE": "60",
            "DTP_ZYGOTE_IDLE": "60",
            "COLUMNS": "80",
        }

    def start(self, *args: object, **options: Any) -> subprocess.Popen[str]:
        command = [str(BIN / "dtp"), *map(str, args)]
        return subprocess.Popen(
            command,
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run(self, *args: object, code: int | None = 0, timeout: float = 90) -> str:
        """Stdout of a command that exits with `code` (None: any)."""
        process = self.start(*args)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"dtp {args} did not end in {timeout} s\n{process.communicate()}")
        self.stderr = err
        if code is not None and process.returncode != code:
            pytest.fail(f"dtp {args}: exit {process.returncode}, not {code}\n{out}\n{err}")
        return out

    def rows(self, *args: object, **options: Any) -> list[dict[str, Any]]:
        """The JSON objects that a command prints, one a line and nothing else."""
        return [json.loads(line) for line in self.run(*args, "--json", **options).splitlines()]

    def job(self, ref: str) -> dict[str, Any]:
        return self.rows("show", ref)[0]

    def until(self, ready: Callable[[], Any], what: str, timeout: float = 60) -> Any:
        """The first truthy answer of `ready`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := ready():
                return found
            time.sleep(0.05)
        pytest.fail(f"{what}: not within {timeout} s; ps: {self.run('ps', '--json', code=None)}")

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this state folder, and what was forked from that."""
        found = {p for p in psutil.process_iter() if self._is_ours(p)}
        for process in tuple(found):
            with contextlib.suppress(psutil.Error):
                found.update(process.children(recursive=True))
        return sorted(found, key=lambda p: p.pid)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                return False
            marks = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            return False
        return any(mark.startswith(str(self.home)) for mark in marks)

    def kinds(self) -> dict[str, list[psutil.Process]]:
        """Processes of this state folder by what they are: controller, agent, zygote, rank,
        client."""
        found: dict[str, list[psutil.Process]] = {
            kind: [] for kind in ("controller", "agent", "zygote", "rank", "client")
        }
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found[_kind(process)].append(process)
        return found


def _kind(process: psutil.Process) -> str:
    if process.name().startswith("dtp:rank"):
        return "rank"
    line = " ".join(process.cmdline())
    named = [k for k in ("controller", "agent", "zygote") if f"dtp_engine.{k}" in line]
    named += [k for k in ("agent", "ranks.zygote") if f"dtp_trainer.{k}" in line]
    return named[0].removeprefix("ranks.") if named else "client" if "/dtp" in line else "rank"


@contextlib.contextmanager
def _dtp(megabytes: int | None = None) -> Iterator[Dtp]:
    """The path is short, so that sockets fit in it and command lines name it."""
    folder = tempfile.mkdtemp(prefix="dtp")
    if megabytes is not None:
        size = f"size={megabytes}m"
        mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
    dtp = Dtp(Path(folder))
    yield dtp
    left = dtp.processes()
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(left, timeout=10)
    if megabytes is not None:
        subprocess.run(["umount", "-l", folder], check=True)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def dtp() -> Iterator[Dtp]:
    """A state folder in which nothing runs yet."""
    with _dtp() as dtp:
        yield dtp


@pytest.fixture
def small_home() -> Iterator[Dtp]:
    """A state folder on a disk of 24 megabytes."""
    with _dtp(megabytes=24) as dtp:
        yield dtp


@pytest.fixture(scope="module")
def warm() -> Iterator[Dtp]:
    """A state folder that the tests of a file share: its controller and warm process stay."""
    with _dtp() as dtp:
        yield dtp


@pytest.fixture
def job_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a script and a job file that runs it; the job is named after the test's folder."""

    def write(script: str, name: str = "", **fields: Any) -> Path:
        name = f"{name or 'job'}-{zlib.crc32(str(tmp_path).encode()):08x}"
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(script)
        spec = {"name": name, "run": "python train.py", "workdir": str(folder), **fields}
        path = folder / f"{name}.yaml"
        path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in spec.items()))
        return path

    return write
