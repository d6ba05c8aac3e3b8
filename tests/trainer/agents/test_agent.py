"""One worker's agent: its claim, its ranks, its lines and its last words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from dtp_trainer import wire

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job


def test_single_worker_trains(job: Job) -> None:
    """A job of one rank runs, reports windows and host use, and ends with 0 everywhere."""
    (worker,) = job.train(1, "--steps", "50")
    assert worker.ended() == 0
    assert worker.exit()["code"] == 0
    last = worker.windows()[-1]
    assert (last.step, last.total_steps) == (50, 50)
    assert last.samples_per_s == pytest.approx(8 / 0.03, rel=1e-4)
    assert sum(window.steps for window in worker.windows()) == 50
    assert any(isinstance(record, wire.Host) for record in worker.log())
    ended = worker.log()[-1]
    assert isinstance(ended, wire.Exit)
    assert ended.code == 0


def test_environment_is_torchruns(job: Job) -> None:
    """A rank finds the variables that torchrun sets, and not the launch file."""
    (job.work / "env.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    (worker,) = job.train(1, command=["python", "env.py"], nproc_per_node=2)
    assert worker.ended() == 0
    found = [json.loads(text) for text in worker.texts() if text.startswith("{")]
    by_rank = {env["RANK"]: env for env in found}
    assert sorted(by_rank) == ["0", "1"]
    one = by_rank["1"]
    assert {name: one[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    names = ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")
    assert [one[name] for name in names] == ["0", "1", "1", "2", "default"]
    assert (one["TORCHELASTIC_RUN_ID"], one["TORCHELASTIC_RESTART_COUNT"]) == (job.id, "0")
    assert (one["OMP_NUM_THREADS"], one["PYTHONUNBUFFERED"]) == ("1", "1")
    assert one["MASTER_ADDR"] == "127.0.0.1"
    assert one["MASTER_PORT"] == by_rank["0"]["MASTER_PORT"]
    assert wire.Env.LAUNCH not in one


def test_second_claim_leaves_no_trace(job: Job) -> None:
    """A second agent for the same worker leaves at once, whatever became of the first."""
    (worker,) = job.train(1)
    job.until((worker.folder / wire.CLAIM_FILE).exists)
    second = job.spawn(worker.folder)
    assert second.wait(20) == wire.ExitCode.FENCED
    assert worker.ended() == 0
    assert worker.exit()["code"] == 0
    assert job.spawn(worker.folder).wait(20) == wire.ExitCode.FENCED


def test_a_removed_state_folder_ends_the_worker(job: Job) -> None:
    """Nobody could ever find or stop it again, so it leaves by itself, with its ranks."""
    (worker,) = job.train(1, "--steps", "1000000")
    job.until(lambda: (gang := job.gang()) is not None and gang.step is not None)
    shutil.rmtree(worker.folder, ignore_errors=True)
    shutil.rmtree(job.storage, ignore_errors=True)
    assert worker.ended() == wire.ExitCode.FENCED


def test_setup_runs_once_in_the_workdir(job: Job) -> None:
    """`setup` runs before the ranks, in the job's folder, and its output is the worker's."""
    (worker,) = job.train(1, "--steps", "2", setup="pwd; echo ready >> made; echo oops >&2")
    assert worker.ended() == 0
    assert (job.work / "made").read_text() == "ready\n"
    said = [line for line in worker.log() if isinstance(line, wire.Text)]
    assert (said[0].source, said[0].stream, said[0].text) == ("worker0", "out", str(job.work))
    assert ("err", "oops") in [(line.stream, line.text) for line in said]


def test_failed_setup_ends_the_gang(job: Job) -> None:
    """A setup that fails ends all workers with SETUP_FAILED and its last words."""
    job.options = {"command": ["python", "train.py"], "workers": 2}
    job.launch(0)
    job.launch(1, setup="echo no space >&2; exit 3")
    assert job.codes() == [wire.ExitCode.SETUP_FAILED] * 2
    reason = "worker 1: setup failed with exit code 3: no space"
    assert [worker.exit()["reason"] for worker in job.workers] == [reason] * 2


def test_missing_command(job: Job) -> None:
    """A script that is not there ends the job at once, in one line that names it."""
    (worker,) = job.train(1, command=["no-such-program", "x"])
    assert worker.ended() == wire.ExitCode.SETUP_FAILED
    assert "no-such-program" in worker.exit()["reason"]


def test_error_file_of_torchelastic(job: Job) -> None:
    """The cause that a script recorded the way torchrun asks for is the failure's name."""
    (job.work / "record.py").write_text(
        "import json, os, sys\n"
        "with open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w') as file:\n"
        "    json.dump({'message': {'message': 'KeyError: lr\\nmore'}}, file)\n"
        "sys.exit(4)\n"
    )
    (worker,) = job.train(1, command=["python", "record.py"], error_budget=0)
    assert worker.ended() == 4
    assert worker.exit()["reason"] == "rank 0 failed: KeyError: lr"


def test_crash_names_its_place(job: Job) -> None:
    """A rank that crashes in native code is blamed with the line at which it stood."""
    (job.work / "crash.py").write_text(
        "import ctypes\ndef read():\n    ctypes.string_at(0)\nread()\n"
    )
    (worker,) = job.train(1, command=["python", "crash.py"], error_budget=0)
    assert worker.ended() == 128 + signal.SIGSEGV
    assert worker.exit()["reason"] == "rank 0 failed: killed by SIGSEGV in read (crash.py:3)"


def test_long_and_binary_lines(job: Job) -> None:
    """A line of a megabyte is cut with a note, binary is decoded, and all lines stay parsable."""
    (job.work / "noise.py").write_text(
        "import sys\n"
        "sys.stdout.buffer.write(b'x' * 1_000_000 + b'\\n' + bytes(range(256)) + b'\\nend\\n')\n"
    )
    (worker,) = job.train(1, command=["python", "noise.py"])
    assert worker.ended() == 0
    texts = worker.texts()
    assert texts[0].endswith(f" … [{1_000_000 - 65536} more bytes of this line were cut]")
    assert len(texts[0]) < 66_000
    assert texts[-1] == "end"
    assert "\ufffd" in texts[-2]


def test_flood_starves_nobody(job: Job) -> None:
    """A rank that floods its output can still be stopped, and its neighbour heard."""
    (job.work / "flood.py").write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    print('still heard', flush=True); time.sleep(60)\n"
        "while True: print('y' * 200)\n"
    )
    (worker,) = job.train(1, command=["python", "flood.py"], nproc_per_node=2)
    job.until(lambda: b"still heard" in (worker.folder / "log").read_bytes())
    worker.ask()
    assert worker.ended() == wire.ExitCode.PAUSED


def test_term_before_the_gang(job: Job) -> None:
    """A worker asked to stop while it prepares leaves at once, with all that its setup started."""
    (worker,) = job.train(1, setup="echo begun; sleep 100 & sleep 100")
    job.until(lambda: "begun" in worker.texts())
    worker.ask()
    assert worker.ended() == wire.ExitCode.PAUSED
    assert worker.exit()["reason"] == "left as asked, before it took part"


def test_script_that_ignores_term(job: Job) -> None:
    """A script that ignores SIGTERM is killed within the grace, and the worker says so."""
    (worker,) = job.train(1, "--deaf", "--steps", "10000", grace_s=3.0)
    job.until(lambda: job.stepped(1))
    worker.ask()
    assert worker.ended(10) == wire.ExitCode.PAUSED
    assert "without a checkpoint" in worker.exit()["reason"]


def test_term_reaches_the_script_in_a_shell(job: Job) -> None:
    """A pause reaches the script that a shell runs; the shell does not die before it."""
    command = ["bash", "-c", "cd . && python train.py --steps 10000; code=$?; exit $code"]
    (worker,) = job.train(1, command=command)
    job.until(lambda: job.stepped(1))
    worker.ask()
    assert worker.ended() == wire.ExitCode.PAUSED


def test_terminal_and_hangup_are_ignored(job: Job) -> None:
    """Closing a terminal or Ctrl-C in it does not touch a worker."""
    (worker,) = job.train(1, "--steps", "30")
    job.until(lambda: job.stepped(1))
    worker.ask(signal.SIGHUP)
    worker.ask(signal.SIGINT)
    assert worker.ended() == 0


def test_work_done_without_evidence(job: Job) -> None:
    """A script that ends with 0 having done nothing is said to have done so."""
    (job.work / "idle.py").write_text("print('Unable to locate sufficient 2 gpus')")
    (worker,) = job.train(1, command=["python", "idle.py"])
    assert worker.ended() == 0
    assert "no_steps" in job.story()
    assert "took no step and formed no process group" in worker.exit()["reason"]


def test_server_at_the_master_port_is_evidence(job: Job) -> None:
    """A script without `Session` that serves its process group's store has formed one."""
    (job.work / "serve.py").write_text(
        "import os, socket, time\n"
        "server = socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT'])))\n"
        "time.sleep(1.5)\n"
    )
    (worker,) = job.train(1, command=["python", "serve.py"])
    assert worker.ended() == 0
    assert "no_steps" not in job.story()


def test_longest_duration(job: Job) -> None:
    """A job that trained for as long as it may leaves by itself with MAX_DURATION."""
    (worker,) = job.train(1, "--steps", "10000", train_until=0.0)
    assert worker.ended() == wire.ExitCode.MAX_DURATION


def test_unusable_launch_file(job: Job) -> None:
    """An agent without a launch file says so in one line."""
    folder = job.folder / "a1" / "w0"
    folder.mkdir(parents=True)
    assert job.spawn(folder).wait(20) == wire.ExitCode.SETUP_FAILED
    (line,) = (folder / "log").read_text().splitlines()
    assert "cannot be used" in line


def test_killed_agent_takes_its_ranks_along(job: Job) -> None:
    """kill -9 of an agent leaves no rank behind."""
    (worker,) = job.train(1, "--steps", "10000")
    job.until(lambda: job.stepped(1))
    (rank,) = worker.ranks()
    os.kill(rank, 0)
    worker.ask(signal.SIGKILL)
    worker.ended()
    job.until(lambda: not job.processes())


def test_import_is_light() -> None:
    """The agent imports no torch: it runs beside every worker."""
    import subprocess

    code = "import sys, dtp_trainer.agent; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
