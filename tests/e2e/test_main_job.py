"""The main job, as a script and a person run it."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLAIN = (HERE / "scripts" / "plain.py").read_text()

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_the_digits_are_learnt_headless(warm: Any) -> None:
    """`dtp run examples/digits.yaml --headless --json` ends with 0 and 97 % or more."""
    rows = warm.rows("run", ROOT / "examples" / "digits.yaml", "--headless", timeout=240)
    result = rows[-1]
    assert result["state"] == "SUCCEEDED"
    assert result["values"]["accuracy"] >= 0.97


def test_a_task_out_of_patience_is_a_success(warm: Any, tmp_path: Path) -> None:
    """Though it took fewer steps than it might have; options of the job file reach it."""
    args = {"model": "resnet", "lr": 0, "weight_decay": 0, "eval_every": 2, "patience": 2}
    training = {"precision": "bf16", "accumulate": 2, "shard": "everything", "non_finite": "stop"}
    spec = {"name": "patient", "task": "vision", "nodes": 2, "args": args, "training": training}
    path = tmp_path / "patient.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in spec.items()))
    warm.run("run", path, "--headless", timeout=240)
    job = warm.job("patient")
    assert (job["state"], job["step"]) == ("SUCCEEDED", 6)


def test_a_script_that_knows_nothing_of_dtp_runs_unchanged(
    warm: Any, job_file: Callable[..., Path]
) -> None:
    """Any script that runs under torchrun runs under `dtp run`."""
    path = job_file(PLAIN, nodes=2, resources={"cpus": 0.5})
    out = warm.run("run", "--headless", path)
    assert "world 2" in out + warm.stderr


def test_a_client_that_is_interrupted_leaves_the_job_alone(
    warm: Any, job_file: Callable[..., Path]
) -> None:
    """Ctrl-C on an attached run exits with 130, says how to come back, and the job trains on."""
    path = job_file("import time\nfor i in range(3000): print(i, flush=True); time.sleep(0.02)\n")
    client = warm.start("run", "--headless", path)
    warm.until(lambda: warm.rows("ps") and warm.job(path.stem)["state"] == "RUNNING", "RUNNING")
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=20)
    assert client.returncode == 130
    assert f"dtp logs -f {path.stem}" in err
    assert warm.job(path.stem)["state"] == "RUNNING"
    warm.run("kill", path.stem)
    warm.run("wait", path.stem, code=3)


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("raise SystemExit(3)", 1, "3"),
        ("raise ValueError('bad rate')", 1, "ValueError: bad rate"),
        ("print('nothing to do')", 0, "no step"),
        ("import sys; sys.stdout.write('x' * 1_000_000 + '\\n')", 0, "cut"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) * 40)", 0, ""),
    ],
)
def test_a_strange_script_ends_as_it_should(
    warm: Any, job_file: Callable[..., Path], script: str, code: int, words: str
) -> None:
    """The exit code and one line say what the script did."""
    path = job_file(script, retry={"on_errors": 0})
    out = warm.run("run", "--headless", path, code=code)
    assert words in out + warm.stderr
    assert "Traceback" not in warm.stderr.replace(out, "") or "ValueError" in words


def test_a_script_that_ignores_sigterm_is_killed_after_the_grace(
    warm: Any, job_file: Callable[..., Path]
) -> None:
    """`dtp stop` ends a deaf script within its grace, and no process is left."""
    script = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
    path = job_file(script + "time.sleep(600)\n", stop_grace="1s")
    warm.run("run", "--detach", path)
    warm.until(lambda: "deaf" in warm.run("logs", path.stem), "the script runs")
    warm.run("stop", path.stem)
    warm.run("wait", path.stem, code=3)
    warm.until(lambda: not warm.kinds()["rank"] and not warm.kinds()["agent"], "all gone")


def test_the_same_key_twice_is_one_job(warm: Any, job_file: Callable[..., Path]) -> None:
    """A repeated submit with an idempotency key answers with the job that there is."""
    path = job_file("print('once')")
    ids = {
        warm.rows("run", "--detach", "--idempotency-key", "nightly", path)[0]["id"] for _ in "12"
    }
    assert len(ids) == 1
    warm.run("wait", ids.pop())


def test_json_is_one_object_a_line(warm: Any, job_file: Callable[..., Path]) -> None:
    """Stdout of `--json` holds JSON objects and nothing else."""
    path = job_file("print('hello')")
    out = warm.run("run", "--headless", "--json", path)
    assert all(isinstance(json.loads(line), dict) for line in out.splitlines())
