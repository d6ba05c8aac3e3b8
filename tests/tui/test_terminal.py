"""``dtp-tui`` in a real terminal: it starts, leaves, and gives the terminal back."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dtp_tui.lifeline import is_there

pytestmark = pytest.mark.skipif(
    shutil.which("tmux") is None, reason="tmux is not installed: no real terminal to test in"
)
DONE = "left-with:"


class Terminal:
    """A tmux server of its own with one window of 80x24."""

    def __init__(self, home: Path) -> None:
        self._name = f"dtp-{uuid.uuid4().hex[:8]}"
        self._home = home

    def open(self, *arguments: str) -> None:
        program = "import sys; from dtp_tui.app import main; main()"
        command = shlex.join([sys.executable, "-c", program, *arguments])
        environment = {"DTP_HOME": str(self._home), "TERM": "xterm-256color"}
        words = [f"{key}={value}" for key, value in environment.items()]
        shell = f"env {shlex.join(words)} {command}; echo {DONE} $?; exec sleep 600"
        self._tmux("new-session", "-d", "-x", "80", "-y", "24", shell)

    def press(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def text(self) -> str:
        return self._tmux("capture-pane", "-p")

    def modes(self) -> str:
        """Alternate screen and mouse reporting: ``0 0`` in a terminal as it should be."""
        return self._tmux("display-message", "-p", "#{alternate_on} #{mouse_any_flag}").strip()

    def until(self, words: str, within_s: float = 30.0) -> str:
        deadline = time.monotonic() + within_s
        while words not in (text := self.text()):
            if time.monotonic() > deadline:
                pytest.fail(f"{words!r} never came:\n{text}")
            time.sleep(0.05)
        return text

    def process(self) -> psutil.Process:
        """The dashboard."""
        shell = psutil.Process(int(self._tmux("display-message", "-p", "#{pane_pid}")))
        return next(p for p in shell.children(recursive=True) if "python" in p.name())

    def close(self) -> None:
        subprocess.run(["tmux", "-L", self._name, "kill-server"], check=False, capture_output=True)

    def _tmux(self, *words: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "TMUX"}
        return subprocess.run(
            ["tmux", "-L", self._name, "-f", "/dev/null", *words],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        ).stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path / "home")
    yield terminal
    terminal.close()


def test_it_starts_without_a_job_and_q_gives_the_terminal_back(terminal: Terminal) -> None:
    """An empty home directory is enough; nothing stays behind on the screen."""
    terminal.open()
    terminal.until("No jobs yet")
    assert terminal.modes() == "1 1"
    terminal.press("q")
    text = terminal.until(f"{DONE} 0")
    assert terminal.modes() == "0 0"
    assert "No jobs yet" not in text


def test_the_demo_shows_a_busy_cluster(terminal: Terminal) -> None:
    """Jobs in many states, at once, with nothing set up; it keeps nothing."""
    terminal.open("--demo")
    text = terminal.until("llama-350m")
    for words in ("Running", "Paused", "Failed", "Succeeded", "resnet50"):
        assert words in text
    terminal.press("q")
    terminal.until(f"{DONE} 0")


def test_a_command_sent_in_one_write_is_whole(terminal: Terminal) -> None:
    """What is pasted or typed ahead reaches the prompt in order."""
    terminal.open("--demo")
    terminal.until("llama-350m")
    terminal.press(":pause end/q1.4", "Enter")
    terminal.until('no job "end/q1.4"')


def test_sigterm_gives_the_terminal_back(terminal: Terminal) -> None:
    """Alternate screen and mouse are off afterwards, the exit code is 128 + 15."""
    terminal.open()
    terminal.until("No jobs yet")
    terminal.process().send_signal(signal.SIGTERM)
    terminal.until(f"{DONE} 143")
    assert terminal.modes() == "0 0"


def test_a_terminal_that_goes_away_ends_it(terminal: Terminal) -> None:
    """Closing the window leaves no dashboard behind."""
    terminal.open()
    terminal.until("No jobs yet")
    process = terminal.process()
    terminal.close()
    process.wait(timeout=30)


def test_state_that_cannot_be_opened_is_one_line(terminal: Terminal, tmp_path: Path) -> None:
    """What is wrong, where, and what to do; the exit code of infrastructure."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "ledger.db").write_bytes(b"no database at all " * 300)
    terminal.open()
    text = terminal.until(f"{DONE} 7")
    assert "damaged" in text
    assert "Traceback" not in text


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = "from dtp_tui.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "check"),
    [
        (["--version"], 0, lambda out: out.stdout.startswith("dtp ")),
        (["--help"], 0, lambda out: "usage: dtp-tui" in out.stdout),
        (["--nonsense"], 2, lambda out: "usage: dtp-tui" in out.stderr),
        ([], 2, lambda out: "needs a terminal" in out.stderr),
    ],
)
def test_without_a_terminal_it_says_what_to_do(
    tmp_path: Path,
    arguments: list[str],
    code: int,
    check: Callable[[subprocess.CompletedProcess[str]], bool],
) -> None:
    """One line and an exit code, never a traceback."""
    ended = run(*arguments, environment={"DTP_HOME": str(tmp_path)})
    assert ended.returncode == code
    assert check(ended)
    assert "Traceback" not in ended.stderr


def test_help_imports_no_textual() -> None:
    """``--version`` is answered before anything heavy is loaded."""
    program = (
        "import sys\nfrom dtp_tui.app import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('textual' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert ended.returncode == 0


def test_a_vanished_terminal_is_noticed() -> None:
    """As soon as nobody holds the other end."""
    ours, theirs = os.openpty()
    assert is_there(theirs)
    os.close(ours)
    assert not is_there(theirs)
    os.close(theirs)
