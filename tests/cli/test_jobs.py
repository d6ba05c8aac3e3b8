"""Commands on real jobs: submitted, followed, asked, waited for, with the real engine below."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from typing import Any

import pytest

HELLO = """\
import os, sys
rank = os.environ["RANK"]
for i in range(3):
    print(f"line {i} of {rank}", flush=True)
print("to stderr", file=sys.stderr)
"""
LONG = """\
import time
print("began", flush=True)
time.sleep(600)
"""


@pytest.fixture
def running(cli: Any) -> Any:
    """A world with a job "long" in RUNNING."""
    cli("run", "-d", cli.job_file(LONG, name="long", nodes="1..2", stop_grace="1s"))
    cli("wait", "long", "--until", "running")
    return cli


def test_run_json(cli: Any) -> None:
    """An attached run tells all as JSON lines: submitted first, result last."""
    rows = cli.rows("run", "--headless", cli.job_file(HELLO, nodes=2))
    names = [row["event"] for row in rows]
    assert names[0] == "submitted"
    assert names[-1] == "result"
    assert {"state", "log", "timeline"} <= set(names)
    said = [row["text"] for row in rows if row["event"] == "log" and row["source"] == "rank1"]
    assert said == ["line 0 of 1", "line 1 of 1", "line 2 of 1", "to stderr"]
    assert (rows[-1]["state"], rows[-1]["exit_code"]) == ("SUCCEEDED", 0)
    assert rows[-1]["duration_s"] > 0
    seen = [row["seq"] for row in rows if row["event"] == "timeline"]
    assert seen == sorted(set(seen))


def test_run_plain(cli: Any) -> None:
    """Without a terminal an attached run prints lines, and how it ended."""
    out = cli("run", cli.job_file(HELLO)).stdout
    assert "rank0 │ line 2 of 0" in out
    assert "hello (" in out.splitlines()[0]
    assert "✓ Succeeded after" in out
    assert "took no step" in out
    assert "\x1b" not in out


def test_a_failing_script(cli: Any) -> None:
    """A job whose script fails exits with 1; what the script exited with is in the result."""
    path = cli.job_file("raise SystemExit(3)", retry={"on_errors": 0})
    rows = cli.rows("run", path, code=1)
    assert (rows[-1]["state"], rows[-1]["rank_exit_code"]) == ("FAILED", 3)
    assert cli.rows("show", "hello")[0]["exit_code"] == 3
    assert "Failed" in cli("wait", "hello", code=1).stdout


def test_dry_run_starts_nothing(cli: Any) -> None:
    """--dry-run prints the plan with every default, and no job comes to be."""
    path = cli.job_file(HELLO, nodes="1..2", env={"HF_TOKEN": "hf_1", "LR": "0.1"})
    out = cli("run", path, "--dry-run").stdout
    assert "on_preemption: unlimited" in out
    assert "would start 2 workers of 1 rank, world size 2" in out
    assert "hf_1" not in out
    plan = cli.rows("run", path, "--dry-run", "--name", "other")[0]
    assert (plan["event"], plan["workers"], plan["spec"]["name"]) == ("plan", 2, "other")
    assert cli.rows("ps") == []
    assert cli.processes() == []


def test_the_same_key_is_the_same_job(cli: Any) -> None:
    """A second run with the same key attaches to the first job and ends as it did."""
    path = cli.job_file("raise SystemExit(3)", retry={"on_errors": 0})
    first = cli.rows("run", path, "--idempotency-key", "nightly", code=1)
    again = cli.rows("run", path, "--idempotency-key", "nightly", code=1)
    assert first[-1]["id"] == again[-1]["id"]
    assert len(cli.rows("ps")) == 1


def test_set_and_name(cli: Any) -> None:
    """--set and --name change the job, not the file."""
    path = cli.job_file(HELLO)
    cli("run", path, "--name", "other", "--set", "tags.team=vision", "--set", "priority=70")
    spec = cli.rows("show", "other")[0]["spec"]
    assert (spec["tags"], spec["priority"]) == ({"team": "vision"}, 70)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_detaches(cli: Any, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and a dropped terminal end the client; the job lives on."""
    client = cli.start("run", cli.job_file(LONG, name="long"))
    cli.until(lambda: "began" in cli("logs", "long").stdout if cli.rows("ps") else "", "output")
    client.send_signal(number)
    _, err = client.communicate(timeout=20)
    assert client.returncode == 128 + number
    assert err == "dtp: detached, long goes on; come back: dtp logs -f long, or dtp-tui\n"
    cli.until(lambda: cli.rows("ps")[0]["state"] == "RUNNING", "RUNNING")


def test_pause_and_resume(running: Any) -> None:
    """A job can be paused, waited for and resumed, which makes a new attempt."""
    assert running("pause", "long").stdout.startswith("long (")
    assert "Paused" in running("wait", "long", "--until", "PAUSED").stdout
    assert "Paused" in running("wait", "long", code=8).stdout
    assert running.rows("resume", "long")[0]["intent"] == "RUN"
    running("wait", "long", "--until", "RUNNING")
    assert len(running.rows("show", "long")[0]["attempts"]) == 2


def test_scale(running: Any) -> None:
    """A job is scaled within its range, and refused beyond it."""
    assert running.rows("scale", "long", "1")[0]["workers"] == 1
    assert "1..2" in running.error("scale", "long", "9")
    assert "fixed" not in running.error("resume", "long")


def test_stop_and_kill(running: Any) -> None:
    """A stopped job ends CANCELLED, and wait says so with 3."""
    running("stop", "long")
    assert running.rows("wait", "long", code=3)[0]["wait_exit_code"] == 3
    running("run", "-d", running.job_file(LONG, name="other"))
    running("kill", "other")
    assert "Cancelled" in running("wait", "other", code=3).stdout


def test_wait_gives_up(running: Any) -> None:
    """--timeout ends the waiting with 124, not the job."""
    assert "after 200ms" in running("wait", "long", "--timeout", "200ms", code=124).stdout
    assert running.rows("ps")[0]["state"] == "RUNNING"


def test_ps(running: Any) -> None:
    """A table for people, a record a line for programs; both name every job."""
    lines = running("ps").stdout.splitlines()
    assert lines[0].split()[:3] == ["NAME", "ID", "STATE"]
    assert lines[1].startswith("long")
    assert "Running" in lines[1]
    row = running.rows("ps")[0]
    assert (row["name"], row["workers"], row["created_by"]) == ("long", 2, "ana@laptop")
    assert row["id"] in lines[1]


def test_show(running: Any) -> None:
    """All about one job, found by the beginning of its id."""
    job_id = running.rows("ps")[0]["id"]
    out = running("show", job_id[:4]).stdout
    assert out.startswith(f"long  {job_id}  ● Running")
    for heading in ("Workers, generation 1", "Attempts", "Last events", "Job file"):
        assert f"\n{heading}" in out
    record = running.rows("show", "long")[0]
    assert record["attempts"][0]["workers"][0]["worker"] == 0
    assert "secret" not in json.dumps(record).lower()


def test_logs(cli: Any) -> None:
    """Lines of all ranks; by rank, pattern, attempt and age on demand."""
    cli("run", cli.job_file(HELLO, nodes=2))
    assert len(cli("logs", "hello").stdout.splitlines()) == 8
    only = cli("logs", "hello", "--rank", "1", "--grep", "line [02]").stdout.splitlines()
    assert [line.split(" │ ")[1] for line in only] == ["line 0 of 1", "line 2 of 1"]
    assert cli("logs", "hello", "--since", "1ms").stdout == ""
    assert len(cli.rows("logs", "hello", "--attempt", "1", "--rank", "0,1")) == 8
    assert "no attempt 7" in cli.error("logs", "hello", "--attempt", "7")
    row = cli.rows("logs", "hello", "--grep", "stderr")[0]
    assert set(row) == {"at", "attempt", "worker", "source", "stream", "text"}


def test_logs_follow_to_the_end(cli: Any) -> None:
    """-f ends with the job and exits as the job did."""
    path = cli.job_file("print('last'); raise SystemExit(3)", retry={"on_errors": 0})
    cli("run", "-d", path)
    assert "last" in cli("logs", "-f", "hello", code=1).stdout


def test_logs_follow_is_left_with_ctrl_c(running: Any) -> None:
    """Ctrl-C leaves -f quietly, with 130."""
    client = running.start("logs", "-f", "long")
    assert client.stdout is not None
    assert "began" in client.stdout.readline()
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=20)
    assert (client.returncode, err) == (130, "")


def test_events(cli: Any) -> None:
    """The timeline says who asked for what."""
    cli("run", cli.job_file(HELLO))
    rows = cli.rows("events", "hello")
    assert rows[0]["actor"] == "ana@laptop"
    assert [row["seq"] for row in rows] == sorted(row["seq"] for row in rows)
    assert "SUCCEEDED" in cli("events").stdout
    follower = cli.start("events", "-f", "--json")
    assert follower.stdout is not None
    assert json.loads(follower.stdout.readline()) == rows[0]
    follower.kill()
    follower.communicate()


def test_metrics_and_checkpoints_of_a_script_without_any(cli: Any) -> None:
    """A job that reports nothing and saves nothing has empty lists, not errors."""
    cli("run", cli.job_file("print('x')"))
    assert cli.rows("ckpt", "ls", "hello") == []
    assert "no checkpoint yet" in cli("ckpt", "ls", "hello").stdout
    assert "no series" in cli.error("metrics", "hello", "--name", "loss")
    assert "5" in cli.error("ckpt", "pin", "hello", "5")


def test_controller(running: Any) -> None:
    """The controller can be seen, stopped and replaced; the job trains on."""
    assert running.rows("controller", "status")[0]["alive"] is True
    assert "drives already" in running.error("controller", "run")
    assert "asked to leave" in running("controller", "stop").stdout
    running.until(lambda: not running.rows("controller", "status")[0]["alive"], "its end")
    assert running.rows("ps")[0]["state"] == "RUNNING"
    running("pause", "long")
    running("wait", "long", "--until", "PAUSED")


def test_completion_of_job_names(running: Any) -> None:
    """The shell offers names of jobs, and ids once one was begun."""
    env = {"_DTP_COMPLETE": "complete_bash", "COMP_WORDS": "dtp show l", "COMP_CWORD": "2"}
    assert running(**env).stdout.split() == ["long"]
    job_id = running.rows("ps")[0]["id"]
    env["COMP_WORDS"] = f"dtp pause {job_id[:3]}"
    assert job_id in running(**env).stdout.split()


def test_a_terminal_gets_a_progress_bar(cli: Any) -> None:
    """On a terminal the run shows its state live, keeps the lines, and restores the cursor."""
    parent, child = pty.openpty()
    path = cli.job_file(HELLO + "import time; time.sleep(1)\n")
    env = {**cli.env, "TERM": "xterm-256color"}
    words = [cli.program, "run", str(path)]
    process = subprocess.Popen(words, env=env, stdin=child, stdout=child, stderr=child)
    os.close(child)
    seen = _read_to_end(parent)
    assert process.wait(20) == 0
    text = seen.decode()
    assert "line 2 of 0" in text
    assert "Running" in text
    assert "Succeeded" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_a_dropped_terminal_leaves_the_job(cli: Any) -> None:
    """When the terminal of an attached run vanishes the client ends, and the job trains on."""
    path = cli.job_file(LONG, name="long")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(cli.program, ["dtp", "run", str(path)], {**cli.env, "TERM": "xterm"})
    cli.until(lambda: "began" in cli("logs", "long").stdout if cli.rows("ps") else "", "output")
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (128 + signal.SIGHUP, 7)
    cli.until(lambda: cli.rows("ps")[0]["state"] == "RUNNING", "RUNNING")
    assert not list(cli.home.glob("logs/crash-*"))


def _read_to_end(fd: int) -> bytes:
    """What comes from a terminal until the other side has closed it."""
    seen = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([fd], [], [], 1)[0]:
            continue
        try:
            part = os.read(fd, 65536)
        except OSError:
            break
        seen += part
    os.close(fd)
    return seen
