"""What a rank sees and how it ends: the same as under a fresh interpreter, forked or executed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dtp_trainer.ranks.launcher import RankExit, RankLauncher, RankProcess, RankSpec, is_forkable
from dtp_trainer.ranks.zygote import frame

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
PYTHON = ("python", "train.py")


@dataclass(frozen=True)
class Ended:
    out: str
    err: str
    exit: RankExit


@dataclass(frozen=True)
class Bench:
    """A launcher, and a folder for the scripts of one test."""

    launcher: RankLauncher
    folder: Path

    def spec(self, argv: tuple[str, ...], **env: str) -> RankSpec:
        return RankSpec(argv, {"PATH": PATH, **env}, str(self.folder))

    def write(self, source: str, name: str = "train.py") -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(textwrap.dedent(source))

    async def start(self, source: str, **env: str) -> RankProcess:
        self.write(source)
        return await self.launcher.start(self.spec(PYTHON, **env))

    async def run(self, source: str, *arguments: str, **env: str) -> Ended:
        self.write(source)
        return await self.run_command((*PYTHON, *arguments), **env)

    async def run_command(self, argv: tuple[str, ...], **env: str) -> Ended:
        rank = await self.launcher.start(self.spec(argv, **env))
        out, err, _ = await asyncio.gather(rank.stdout.read(), rank.stderr.read(), rank.wait())
        assert rank.exit is not None
        return Ended(out.decode(), err.decode(), rank.exit)


@pytest.fixture(scope="module")
def zygotes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose warm processes leave when the tests of this file are done."""
    folder = tmp_path_factory.mktemp("zygotes")
    yield folder
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.send(frame({"idle_s": 0.01}))
            connection.recv(4096)


@pytest.fixture
async def bench(zygotes: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    """A warm process with little in it starts at once, and forks in the same way."""
    async with RankLauncher(zygotes=zygotes, idle_s=60, preload=("calendar",)) as launcher:
        yield Bench(launcher, tmp_path)


async def first_line(rank: RankProcess) -> str:
    return (await rank.stdout.readline()).decode().strip()


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(20):
        while any(alive(pid) for pid in pids):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ------------------------------------------------------------------------------ what a rank sees


LOOK = """
    import json, os, sys
    print(json.dumps({
        "argv": sys.argv, "cwd": os.getcwd(), "path0": sys.path[0], "env": dict(os.environ),
        "name": __name__, "file": __file__, "safe": sys.modules["__main__"].__dict__ is globals(),
        "group": os.getpgrp() == os.getpid(), "stdin": sys.stdin.read(),
        "descriptors": len(os.listdir("/proc/self/fd")), "comm": open("/proc/self/comm").read(),
        "ps": open("/proc/self/cmdline").read().rstrip("\\0").split("\\0"),
    }))
"""


async def test_a_script_sees_its_own_arguments_folder_and_environment(bench: Bench) -> None:
    """Nothing of the agent's or the zygote's process shows through."""
    seen = json.loads((await bench.run(LOOK, "--lr", "0.1", RANK="3")).out)
    assert seen["argv"] == ["train.py", "--lr", "0.1"]
    assert seen["cwd"] == seen["path0"] == str(bench.folder)
    assert seen["env"] == {"PATH": PATH, "RANK": "3"}
    assert (seen["name"], seen["file"]) == ("__main__", str(bench.folder / "train.py"))
    assert seen["safe"]
    assert seen["group"]
    assert seen["stdin"] == ""
    assert seen["descriptors"] == 5  # 0, 1, 2, the report, and the one that lists them
    assert seen["comm"].strip() == "dtp:rank3"
    assert seen["ps"] == ["python", "train.py", "--lr", "0.1"]


async def test_a_process_is_named_by_its_pid_and_start_time(bench: Bench) -> None:
    """The handle's start time is the one that psutil tells of the same process."""
    rank = await bench.start("import time; print('up'); time.sleep(60)")
    assert await first_line(rank) == "up"
    assert psutil.Process(rank.pid).create_time() == pytest.approx(rank.start_time, abs=0.02)


@pytest.mark.parametrize("name", ["trainer", "engine", "session", "zygote", "program"])
async def test_a_neighbour_module_is_the_users_own(bench: Bench, name: str) -> None:
    """A module beside the script wins over any of ours with such a name."""
    bench.write("who = 'mine'", f"{name}.py")
    ended = await bench.run(f"import {name}; print({name}.who)")
    assert (ended.out, ended.exit.code) == ("mine\n", 0)


async def test_a_neighbour_with_the_name_of_a_loaded_module_wins(bench: Bench) -> None:
    """A `calendar.py` beside the script is imported although the zygote has the library's."""
    bench.write("who = 'mine'", "calendar.py")
    ended = await bench.run("import calendar; print(calendar.who)")
    assert (ended.out, ended.exit.code) == ("mine\n", 0)


async def test_pythonpath_comes_after_the_scripts_folder(bench: Bench) -> None:
    """Relative entries count from the rank's folder."""
    bench.write("who = 'library'", "lib/helper.py")
    ended = await bench.run("import helper; print(helper.who)", PYTHONPATH="lib")
    assert ended.out == "library\n"


async def test_a_module_runs_with_dash_m(bench: Bench) -> None:
    """`python -m package.module` runs from the current folder, with its package."""
    bench.write("", "pack/__init__.py")
    bench.write("value = 7", "pack/other.py")
    bench.write("import sys; from pack.other import value; print(value, sys.argv)", "pack/go.py")
    ended = await bench.run_command(("python", "-u", "-m", "pack.go", "x"))
    assert ended.out == f"7 ['{bench.folder}/pack/go.py', 'x']\n"
    assert ended.exit == RankExit(0, formed_group=False, error=None)


async def test_forked_ranks_draw_different_random_numbers(bench: Bench) -> None:
    """Two ranks that set no seed do not get the same one from the fork."""
    source = "import random; print(random.random())"
    assert (await bench.run(source)).out != (await bench.run(source)).out


async def test_a_line_is_out_before_the_rank_ends(bench: Bench) -> None:
    """Output into the pipe is not held back, so that a killed rank's last words are known."""
    rank = await bench.start("import time; print('step 1'); time.sleep(60)")
    assert await first_line(rank) == "step 1"


async def test_multiprocessing_children_import_the_script(bench: Bench) -> None:
    """A spawned child finds ``__main__`` and its functions."""
    ended = await bench.run("""
        import multiprocessing
        def double(x): return 2 * x
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(double, [1, 2]))
        """)
    assert ended.out == "[2, 4]\n", ended.err


# ------------------------------------------------------------------------------- how a rank ends


@pytest.mark.parametrize(
    ("ending", "code", "err", "error"),
    [
        ("pass", 0, "", None),
        ("sys.exit(3)", 3, "", None),
        ("sys.exit(None)", 0, "", None),
        ("sys.exit('no data')", 1, "no data\n", "no data"),
        ("sys.exit(-1)", 255, "", None),
        ("os._exit(5)", 5, "", None),
        ("os.kill(os.getpid(), 9)", -9, "", None),
        ("os.kill(os.getpid(), 15)", -15, "", None),
        ("os.abort()", -6, "", None),
    ],
)
async def test_exit_codes(
    bench: Bench, ending: str, code: int, err: str, error: str | None
) -> None:
    """The code is the one that `subprocess` would tell of a fresh interpreter."""
    ended = await bench.run(f"import os, sys\n{ending}")
    assert (ended.exit.code, ended.err, ended.exit.error) == (code, err, error)


async def test_an_exception_prints_what_python_prints(bench: Bench, tmp_path: Path) -> None:
    """The traceback has no frame of ours; the handle has the error in one line."""
    source = """
        def check(lr):
            raise ValueError("bad lr")
        check(1)
        """
    ended = await bench.run(source, TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    plain = await bench.run_command(PYTHON, DTP_NO_ZYGOTE="1")
    assert ended.err == plain.err
    assert ended.exit == RankExit(1, formed_group=False, error="ValueError: bad lr (train.py:3)")
    left = json.loads((tmp_path / "error.json").read_text())["message"]
    assert left["message"] == "ValueError: bad lr"
    assert "in check" in left["extraInfo"]["py_callstack"]


async def test_an_error_file_of_the_scripts_own_stays(bench: Bench, tmp_path: Path) -> None:
    """What ``@record`` wrote is not written over."""
    (tmp_path / "error.json").write_text("{}")
    await bench.run("raise ValueError", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert (tmp_path / "error.json").read_text() == "{}"


async def test_a_syntax_error_names_its_line(bench: Bench) -> None:
    """A script that cannot be compiled is reported as Python reports it."""
    ended = await bench.run("x = = 1\n")
    plain = await bench.run_command(PYTHON, DTP_NO_ZYGOTE="1")
    assert ended.err == plain.err
    assert ended.exit.error == "SyntaxError: invalid syntax (train.py, line 1)"


async def test_an_interrupt_ends_as_in_python(bench: Bench) -> None:
    """SIGINT raises KeyboardInterrupt in the script; uncaught, the rank dies of the signal."""
    rank = await bench.start("import time; print('up'); time.sleep(60)")
    await first_line(rank)
    rank.signal(signal.SIGINT)
    assert await rank.wait() == -signal.SIGINT
    assert b"KeyboardInterrupt" in await rank.stderr.read()


async def test_sigterm_reaches_the_scripts_handler(bench: Bench) -> None:
    """A rank can answer a request to stop with an exit code of its own."""
    rank = await bench.start("""
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("up")
        while True: signal.pause()
        """)
    await first_line(rank)
    rank.signal(signal.SIGTERM)
    assert await rank.wait() == 75


async def test_threads_atexit_and_open_files_are_finished(bench: Bench) -> None:
    """A rank does not end before its threads, and nothing that it wrote is lost."""
    ended = await bench.run("""
        import atexit, threading, time
        held = open("left-open.txt", "w"); held.write("all of it")
        atexit.register(print, "atexit")
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
        print("end of script")
        """)
    assert ended.out == "end of script\nthread\natexit\n"
    assert (bench.folder / "left-open.txt").read_text() == "all of it"


async def test_what_a_rank_leaves_behind_ends_with_it(bench: Bench) -> None:
    """A child that outlives the rank in its process group is killed, so its output ends too."""
    rank = await bench.start("""
        import subprocess
        print(subprocess.Popen(["sleep", "600"]).pid)
        """)
    left = int(await first_line(rank))
    assert await rank.wait() == 0
    await until_gone(left)
    assert await rank.stdout.read() == b""


@pytest.mark.parametrize("env", [{}, {"DTP_NO_ZYGOTE": "1"}], ids=["forked", "executed"])
async def test_kill_takes_the_whole_group(bench: Bench, env: dict[str, str]) -> None:
    """A rank that ignores SIGTERM goes with its children by SIGKILL."""
    rank = await bench.start(
        """
        import signal, subprocess, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
        signal.pause()
        """,
        **env,
    )
    child = int(await first_line(rank))
    rank.kill()
    assert await rank.wait() == -signal.SIGKILL
    await until_gone(rank.pid, child)


async def test_a_mebibyte_in_one_line_and_binary_output_pass(bench: Bench) -> None:
    """Output is bytes; no length of a line and no encoding is assumed."""
    ended = await bench.run("""
        import sys
        print("x" * (1 << 20))
        sys.stdout.flush(); sys.stdout.buffer.write(b"~end")
        """)
    assert len(ended.out) == (1 << 20) + 5
    assert ended.out.endswith("\n~end")


# -------------------------------------------------------------------------------- executed ranks


async def test_a_shell_command_is_executed(bench: Bench) -> None:
    """Any command runs behind the same handle."""
    ended = await bench.run_command(
        ("bash", "-c", 'echo "$RANK $PWD"; echo oh >&2; exit 4'), RANK="2"
    )
    assert (ended.out, ended.err) == (f"2 {bench.folder}\n", "oh\n")
    assert ended.exit == RankExit(4, formed_group=None, error=None)


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        (("no-such-program",), 127, "no-such-program was not found"),
        (("./data.txt",), 126, "./data.txt is not executable"),
        (("./noshebang",), 126, "./noshebang: Exec format error"),
    ],
)
async def test_a_command_that_cannot_run_says_so(
    bench: Bench, argv: tuple[str, ...], code: int, problem: str
) -> None:
    """Shell's exit codes, and one line both in the log and in the handle."""
    bench.write("text", "data.txt")
    bench.write("text", "noshebang")
    (bench.folder / "noshebang").chmod(0o755)
    ended = await bench.run_command(argv)
    assert (ended.exit.code, ended.exit.error) == (code, problem)
    assert ended.err == f"dtp: {problem}\n"


@pytest.mark.parametrize("argv", [PYTHON, ("bash", "-c", "true")], ids=["forked", "executed"])
async def test_a_missing_folder_says_so(bench: Bench, argv: tuple[str, ...]) -> None:
    """A working folder that is not there is an exit with a reason, not an exception."""
    spec = RankSpec(argv, {"PATH": PATH}, "/no/such/folder")
    rank = await bench.launcher.start(spec)
    assert await rank.wait() == 126
    assert rank.exit is not None
    assert rank.exit.error == "cannot start in /no/such/folder: No such file or directory"


async def test_a_missing_script_exits_as_pythons_does(bench: Bench) -> None:
    """Exit code 2 and Python's own words."""
    ended = await bench.run_command(("python", "missing.py"))
    plain = await bench.run_command(("python", "missing.py"), DTP_NO_ZYGOTE="1")
    assert (ended.exit.code, plain.exit.code) == (2, 2)
    assert "can't open file" in (ended.exit.error or "")
    assert ended.err.partition(":")[2] == plain.err.partition(":")[2]


async def test_python_without_a_path_is_our_own(bench: Bench) -> None:
    """Where PATH has no Python, the word means the interpreter that runs the agent."""
    bench.write("import sys; print(sys.prefix)")
    for env in ({}, {"DTP_NO_ZYGOTE": "1"}):
        spec = RankSpec(PYTHON, {"PATH": "/nowhere", **env}, str(bench.folder))
        rank = await bench.launcher.start(spec)
        assert await first_line(rank) == sys.prefix
        assert await rank.wait() == 0


@pytest.mark.parametrize(
    ("command", "env", "forkable"),
    [
        (PYTHON, {}, True),
        (("python3", "-u", "train.py", "-c"), {}, True),
        ((sys.executable, "train.py"), {}, True),
        (("python", "-m", "package", "--x"), {}, True),
        (PYTHON, {"DTP_NO_ZYGOTE": "1"}, False),
        (PYTHON, {"DTP_NO_ZYGOTE": "0"}, True),
        (("bash", "-c", "python train.py"), {}, False),
        (("python", "-c", "pass"), {}, False),
        (("python", "-O", "train.py"), {}, False),
        (("python", "-"), {}, False),
        (("python",), {}, False),
        (("python", "folder"), {}, False),
        (("/usr/bin/env", "python", "train.py"), {}, False),
        (("torchrun", "train.py"), {}, False),
    ],
)
def test_is_forkable(command: tuple[str, ...], env: dict[str, str], forkable: bool) -> None:
    """Only plain scripts and modules of this very interpreter, unless it was forbidden."""
    assert is_forkable(command, {"PATH": PATH, **env}) is forkable


def test_another_environments_python_is_not_forkable(tmp_path: Path) -> None:
    """Two virtual environments share the file behind their links, not their packages."""
    (tmp_path / "python").symlink_to(Path(sys.executable).resolve())
    assert not is_forkable(PYTHON, {"PATH": str(tmp_path)})
