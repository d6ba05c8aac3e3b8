"""The installed `dtp` over a state folder of its own; nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAM = Path(sys.executable).parent / "dtp"


class Cli:
    """Commands in a small world: own state, own configuration, no colours, 80 columns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = str(PROGRAM)
        self.home = folder / "home"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("DTP_", "XDG_"))},
            "DTP_HOME": str(self.home),
            "DTP_ACTOR": "ana@laptop",
            "DTP_CONTROLLER_IDLE": "60",
            "DTP_ZYGOTE_IDLE": "5",
            "XDG_CONFIG_HOME": str(folder / "config"),
            "COLUMNS": "80",
        }

    def start(self, *words: object, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(PROGRAM), *map(str, words)],
            env={**self.env, **env},
            cwd=self.folder,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(
        self, *words: object, code: int = 0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """A command that must exit with `code` and show no traceback."""
        process = self.start(*words, **env)
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"dtp {words} did not end: {process.communicate()}")
        assert process.returncode == code, f"dtp {words}: {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err
        return subprocess.CompletedProcess([*map(str, words)], process.returncode, out, err)

    def rows(self, *words: object, code: int = 0) -> list[dict[str, Any]]:
        """What a command prints with --json: one object a line, and nothing else."""
        return [json.loads(line) for line in self(*words, "--json", code=code).stdout.splitlines()]

    def error(self, *words: object, code: int = 2, **env: str) -> str:
        """The one line that a command fails with."""
        done = self(*words, code=code, **env)
        assert done.stdout == ""
        line, rest = done.stderr.split("\n", 1)
        assert rest == ""
        return line.removeprefix("dtp: ")

    def until(self, ready: Callable[[], Any], what: str) -> Any:
        """The first truthy answer of `ready`."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if found := ready():
                return found
            time.sleep(0.05)
        pytest.fail(f"{what} did not come: {self('ps').stdout}")

    def job_file(self, script: str, name: str = "hello", **fields: Any) -> Path:
        """A job file beside a script of its own; its ranks do without a warm process."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(script)
        spec = {"run": "python train.py", "resources": {"cpus": 0.1}, **fields}
        spec["env"] = {"DTP_NO_ZYGOTE": "1", **fields.get("env", {})}
        path = folder / f"{name}.yaml"
        path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in spec.items()))
        return path

    def processes(self) -> list[psutil.Process]:
        """Everything that runs over this state folder."""
        return [process for process in psutil.process_iter() if self._ours(process)]

    def _ours(self, process: psutil.Process) -> bool:
        try:
            return (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get("DTP_HOME") == str(self.home)
            )
        except psutil.Error:
            return False


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    yield cli
    left = cli.processes()
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(left, timeout=10)
