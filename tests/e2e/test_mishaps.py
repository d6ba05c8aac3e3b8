"""What goes wrong around a job is said in one line, and costs nothing that was there."""

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

LONG = "import time\nfor i in range(6000): time.sleep(0.05)\n"
SCRIPTS = Path(__file__).parent / "scripts"
STUCK, HUNGRY = ((SCRIPTS / name).read_text() for name in ("stuck.py", "hungry.py"))


def fill(path: Path) -> None:
    """Until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


def test_a_ledger_of_a_newer_version_is_left_untouched(dtp: Any) -> None:
    """Every command ends with 7 and says so; the file stays as it was."""
    dtp.home.mkdir(exist_ok=True)
    with sqlite3.connect(dtp.home / "ledger.db") as ledger:
        ledger.execute("PRAGMA user_version = 999")
    ledger.close()
    before = (dtp.home / "ledger.db").read_bytes()
    dtp.run("ps", code=7)
    assert "newer" in one_line(dtp.stderr)
    assert (dtp.home / "ledger.db").read_bytes() == before


def test_a_locked_ledger_is_waited_for_and_then_said(
    dtp: Any, job_file: Callable[..., Path]
) -> None:
    """A submit that could not be recorded ends with 7, and nothing was submitted."""
    path = job_file("print('hello')")
    dtp.run("run", path)
    lock = sqlite3.connect(dtp.home / "ledger.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    dtp.run("run", "--detach", path, code=7)
    assert "locked" in one_line(dtp.stderr)
    lock.rollback()
    lock.close()
    assert len(dtp.rows("ps", "--all")) == 1


def test_a_hang_names_the_rank_that_is_behind(warm: Any, job_file: Callable[..., Path]) -> None:
    """No step for longer than the watchdog allows: exit code 6, and which rank stands where."""
    path = job_file(
        STUCK,
        nodes=2,
        resources={"cpus": 0.5},
        watchdog={"no_step_for": "3s"},
        retry={"on_hang": 0},
    )
    warm.run("run", "--headless", path, code=6)
    assert "rank 1" in warm.job(path.stem)["detail"]


def test_a_rank_that_runs_out_of_memory_is_named(warm: Any, job_file: Callable[..., Path]) -> None:
    """Not its peer, which only lost it; with the step, and what helps."""
    path = job_file(HUNGRY, nodes=2, resources={"cpus": 0.5}, retry={"on_errors": 0})
    warm.run("run", "--headless", path, code=None)
    job = warm.job(path.stem)
    assert job["state"] == "FAILED"
    assert "rank 1 ran out of memory on cpu in step 4" in job["detail"]
    assert "accumulate: 2" in job["detail"]


def test_requests_that_make_no_sense_are_refused(warm: Any, job_file: Callable[..., Path]) -> None:
    """Each is one line and exit code 2, and the job trains on."""
    path = job_file(LONG, nodes=1)
    warm.run("run", "--detach", path)
    warm.until(lambda: warm.job(path.stem)["state"] == "RUNNING", "RUNNING")
    for arguments, words in (
        (("resume", path.stem), "RUNNING"),
        (("scale", path.stem, 3), "nodes"),
        (("pause", "nobody"), "nobody"),
        (("resume", path.stem, "--from", 12), "12"),
    ):
        warm.run(*arguments, code=2)
        assert words in one_line(warm.stderr)
    assert warm.job(path.stem)["state"] == "RUNNING"
    warm.run("kill", path.stem)
    warm.run("wait", path.stem, code=3)


def test_a_full_disk_costs_checkpoints_and_not_the_job(
    small_home: Any, job_file: Callable[..., Path]
) -> None:
    """Training goes on while the disk is full, and checkpoints once it has room again."""
    script = (Path(__file__).parent / "scripts" / "ballast.py").read_text()
    path = job_file(script, checkpoint={"every": "10 steps", "keep": 2})
    small_home.run("run", "--detach", path)
    small_home.until(lambda: small_home.rows("ckpt", "ls", path.stem), "a checkpoint")
    ballast = small_home.home / "ballast"
    fill(ballast)
    small_home.until(
        lambda: "disk is full" in small_home.run("logs", path.stem, code=None), "a failed save"
    )
    ballast.unlink()
    small_home.run("wait", path.stem, code=0)
    steps = [row["step"] for row in small_home.rows("ckpt", "ls", path.stem)]
    assert steps[-1] == 300


def test_a_frozen_controller_is_replaced(dtp: Any, job_file: Callable[..., Path]) -> None:
    """One that exists but does not renew its lease drives no longer; the request is answered."""
    dtp.env["DTP_LEASE_TTL"] = "3"
    path = job_file(LONG)
    dtp.run("run", "--detach", path)
    dtp.until(lambda: dtp.job(path.stem)["state"] == "RUNNING", "RUNNING")
    (frozen,) = dtp.kinds()["controller"]
    frozen.suspend()
    dtp.until(lambda: dtp.rows("controller", "status")[0]["silent"], "silence")
    dtp.run("kill", path.stem)
    dtp.run("wait", path.stem, code=3)
    assert dtp.rows("controller", "status")[0]["alive"]


def test_looking_at_a_job_brings_it_back(dtp: Any, job_file: Callable[..., Path]) -> None:
    """After everything was killed at once, `dtp ps` alone makes the job go on."""
    path = job_file(LONG)
    dtp.run("run", "--detach", path)
    dtp.until(lambda: dtp.job(path.stem)["state"] == "RUNNING", "RUNNING")
    for process in dtp.processes():
        process.kill()
    dtp.until(lambda: dtp.rows("ps")[0]["attempt"] == 2, "the next attempt")
    dtp.run("kill", path.stem)
    dtp.run("wait", path.stem, code=3)
