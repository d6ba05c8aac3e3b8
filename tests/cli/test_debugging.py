"""Trying a job, stopping in it, and being told why it failed."""

from __future__ import annotations

import os
import pty
import select
import time
from typing import Any

HALTS = """\
import os
from dtp_of_this_test import scale
rank = os.environ["RANK"]
print("rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)
if rank == "0":
    answer = 6 * 7
    breakpoint()
    scale(answer, 0)
"""
FAILS = """\
import os, sys, time
print("loading the weights", flush=True)
if os.environ["RANK"] == "1":
    try:
        {}["decoder"]
    except KeyError as error:
        print("no decoder", flush=True)
        raise ValueError("the weights have no decoder in them") from error
time.sleep(60)
"""


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, cli: Any, *words: str) -> None:
        env = {**cli.env, "TERM": "dumb", "DTP_ACTOR": "ana@laptop"}
        self._pid, self._end = pty.fork()
        if self._pid == 0:
            os.execve(cli.program, ["dtp", *words], env)
        self.seen = ""

    def read_until(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._end], [], [], 0.2)[0]:
                self.seen += os.read(self._end, 65536).decode(errors="replace")

    def type(self, line: str) -> None:
        self.seen = ""
        os.write(self._end, f"{line}\n".encode())

    def wait(self) -> int:
        try:
            while chunk := os.read(self._end, 65536):
                self.seen += chunk.decode(errors="replace")
        except OSError:
            pass  # the other end was closed
        os.close(self._end)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def test_debug_stops_and_examines(cli: Any) -> None:
    """breakpoint() stops rank 0 in the terminal, an exception where it happened; no job comes to
    be."""
    path = cli.job_file(HALTS, nodes=2, nproc_per_node=2)
    (path.parent / "dtp_of_this_test.py").write_text("def scale(x, by):\n    return x / by\n")
    terminal = Terminal(cli, "run", "--debug", str(path))
    terminal.read_until("(Pdb) ")
    terminal.type("p answer")
    terminal.read_until("42\r\n(Pdb) ")
    terminal.type("c")
    terminal.read_until("(Pdb) ")
    assert "ZeroDivisionError" in terminal.seen
    terminal.type("p by")
    terminal.read_until("0\r\n(Pdb) ")
    terminal.type("q")
    assert terminal.wait() == 1
    assert cli.rows("ps", "--all") == []


def test_debug_stops_rank_0_alone(cli: Any) -> None:
    """A breakpoint() that every rank comes to, even with a debugger of the job's own choice, is
    passed by in the others, while rank 0 stands in it."""
    script = "import os\nbreakpoint()\nprint(os.environ['RANK'], 'went on', flush=True)\n"
    path = cli.job_file(script, env={"PYTHONBREAKPOINT": "pdb.set_trace"})
    terminal = Terminal(cli, "run", "--debug", str(path), "--set", "nproc_per_node=2")
    terminal.read_until("(Pdb) ")
    terminal.read_until("[rank1] 1 went on")
    assert "0 went on" not in terminal.seen
    terminal.type("c")
    assert terminal.wait() == 0
    assert "0 went on" in terminal.seen


def test_debug_shows_the_other_ranks(cli: Any) -> None:
    """What they write comes behind their names; --nproc says how many there are."""
    script = "import os\nprint('I am', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n"
    terminal = Terminal(cli, "run", "--debug", str(cli.job_file(script)), "--nproc", "3")
    assert terminal.wait() == 0
    assert "\nI am 0 of 3\r\n" in terminal.seen
    assert {"[rank1] I am 1 of 3", "[rank2] I am 2 of 3"} <= set(terminal.seen.splitlines())


def test_debug_needs_a_terminal(cli: Any) -> None:
    """Without one, and beside options for another place, it is refused in one line."""
    path = cli.job_file("print('x')")
    assert "needs a terminal" in cli.error("run", "--debug", path)
    assert "--debug" in cli.error("run", "--debug", "--headless", path)
    assert "by name" in cli.error("run", "--debug", "-")


def test_a_try_of_a_script_without_steps(cli: Any) -> None:
    """That --steps did not end it is said."""
    done = cli("run", cli.job_file("print('x')"), "--steps", "5")
    assert "--steps could not end it" in done.stderr


def test_show_begins_with_the_failure(cli: Any) -> None:
    """The first failing rank's traceback with its cause, then its other lines, then the rest; the
    cause is told once among the events."""
    cli("run", cli.job_file(FAILS, nodes=2, retry={"on_errors": 1}), code=1)
    text = cli("show", "hello").stdout
    assert text.index("Traceback") < text.index("loading the weights") < text.index("submitted")
    assert "KeyError: 'decoder'" in text[: text.index("loading the weights")]
    events = text[text.index("Last events") : text.index("Job file")]
    assert events.count("the weights have no decoder in them") == 1
    failure = cli.rows("show", "hello")[0]["failure"]
    assert failure["rank"] == 1
    assert failure["traceback"][-1] == "ValueError: the weights have no decoder in them"
    assert failure["traceback"][0] == "Traceback (most recent call last):"
    assert failure["lines"] == ["loading the weights", "no decoder"]


def test_profile_refuses_in_one_line(cli: Any) -> None:
    """A job that does not run, or takes no steps, or has no such rank, cannot be profiled."""
    cli("run", "-d", cli.job_file("import time\ntime.sleep(600)\n", name="long"))
    cli("wait", "long", "--until", "running")
    assert "Session" in cli.error("profile", "long")
    assert "--rank" in cli.error("profile", "long", "--rank", "some")
    assert "--wait" in cli.error("profile", "long", "--wait", "soon")
    cli("kill", "long")
    cli("wait", "long", code=3)
    assert "only a running job" in cli.error("profile", "long")
