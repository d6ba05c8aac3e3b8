"""What W&B and TensorBoard hold after real agents trained: read back with their own code."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from dtp_trainer import wire

if TYPE_CHECKING:
    from tests.trainer.agents.conftest import Job, Worker

pytest.importorskip("wandb")
pytest.importorskip("tensorboard")

OFFLINE = {"DTP_NO_ZYGOTE": "1", "WANDB_API_KEY": ""}
ALL: dict[str, Any] = {
    "trackers": {"wandb": {"project": "digits", "tags": ["a"]}, "tensorboard": {}},
    "config": {"name": "job", "args.lr": 0.1},
    "env": OFFLINE,
}


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a ``.wandb`` file: LevelDB's log format around protocol buffers."""
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield MessageToDict(Record.FromString(whole), preserving_proto_field_name=True)
            whole = b""


def wandb_files(job: Job) -> list[Path]:
    return sorted(job.storage.glob(f"wandb/offline-run-*-{job.id}/run-{job.id}.wandb"))


def logged(path: Path) -> list[dict[str, float]]:
    """What was logged, a mapping a row."""
    items = [record["history"]["item"] for record in rows_of(path) if "history" in record]
    found = [
        {"/".join(i.get("nested_key", [])) or i["key"]: float(i["value_json"]) for i in row}
        for row in items
    ]
    return [row for row in found if "loss" in row]


def curves(job: Job, run: str = "job") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(job.storage / "tensorboard" / run))
        found.Reload()
    return found


def side_process(worker: Worker) -> psutil.Process | None:
    for child in psutil.Process(worker.process.pid).children():
        with contextlib.suppress(psutil.Error):  # one that just ended
            if "dtp_trainer.trackers" in " ".join(child.cmdline()):
                return child
    return None


def grows(steps: list[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(steps))


@pytest.mark.slow
def test_one_run_over_a_pause(job: Job) -> None:
    """Paused and resumed, W&B has one run id and TensorBoard one curve; steps only grow, the
    configuration is there, and nothing lies in the working folder."""
    first = job.train(1, "--steps", "100000", grace_s=40.0, **ALL)
    job.until(lambda: wandb_files(job))
    first[0].ask()
    assert job.codes() == [75]
    paused = logged(wandb_files(job)[0])
    assert paused, first[0].texts()

    end = first[0].windows()[-1].step + 60
    again = job.launch(0, attempt=2, command=["python", "train.py", "--steps", str(end)])
    assert again[0].ended() == 0
    files = wandb_files(job)
    assert len(files) == 2
    last = [*rows_of(files[1])]
    run = next(record["run"] for record in last if "run" in record)
    assert (run["run_id"], run["project"], run["display_name"]) == (job.id, "digits", "job")
    assert {"key": "args.lr", "value_json": "0.1"} in run["config"]["update"]
    assert next(record["exit"] for record in last if "exit" in record).get("exit_code", 0) == 0
    assert [record for record in rows_of(files[0]) if "preempting" in record]
    assert grows([row["step"] for file in files for row in logged(file)])
    assert grows([row["_step"] for file in files for row in logged(file)])

    steps = [point.step for point in curves(job).Scalars("loss")]
    assert steps[-1] == end
    assert grows(steps)
    assert curves(job).Tags()["tensors"] == ["config"]
    assert {path.name for path in job.work.iterdir()} == {"train.py"}
    assert any(text.startswith("dtp: W&B: offline (no WANDB_API_KEY)") for text in first[0].texts())


@pytest.mark.slow
def test_steps_trained_again_are_logged_once(job: Job) -> None:
    """A rank that fails and starts over leaves curves that only go forward, to the end."""
    workers = job.train(1, "--steps", "200", "--fail", "0:150:1", **ALL)
    assert job.codes() == [0]
    (file,) = wandb_files(job)
    assert grows([row["step"] for row in logged(file)]), workers[0].texts()
    steps = [point.step for point in curves(job).Scalars("loss")]
    assert grows(steps)
    assert steps[-1] == 200
    generations = [point.value for point in curves(job).Scalars("job/generation")]
    assert set(generations) == {2.0}


@pytest.mark.slow
def test_a_tracker_that_dies_or_hangs_is_no_business_of_the_job(job: Job) -> None:
    """Its process killed and its successor frozen, the job ends with 0 at its own pace, says what
    happened, and leaves no process."""
    (worker,) = job.train(1, "--steps", "100000", grace_s=4.0, **ALL)
    first = job.until(lambda: side_process(worker))
    job.until(worker.windows)
    first.kill()
    second = job.until(lambda: (found := side_process(worker)) and found.pid != first.pid and found)
    second.suspend()
    job.until(lambda: len(worker.windows()) > 3)
    worker.ask()
    assert job.codes() == [75]
    assert not second.is_running() or second.status() == psutil.STATUS_ZOMBIE
    said = "\n".join(worker.texts())
    assert "their process ended with -9" in said
    assert "not finished after" in said


@pytest.mark.slow
def test_another_leader_goes_on_with_the_same_curves(job: Job) -> None:
    """The leader killed, its worker's trackers close their files and the next leader's go on."""
    workers = job.train(2, "--steps", "100000", **ALL)
    job.until(lambda: job.stepped(1) and wandb_files(job))
    gang = job.gang()
    assert gang is not None
    old = workers[gang.leader]
    os.killpg(old.process.pid, signal.SIGKILL)
    rest = workers[1 - gang.leader]
    job.until(lambda: job.stepped(2))
    job.until(lambda: len(wandb_files(job)) == 2)
    rest.ask()
    assert rest.ended() == 75
    assert not [text for text in old.texts() if "trained again" in text]
    generations = {point.value for point in curves(job).Scalars("job/generation")}
    assert 2.0 in generations
    assert grows([point.step for point in curves(job).Scalars("loss")])


@pytest.mark.slow
def test_checkpoints_become_references_where_nothing_is_sent(job: Job, tmp_path: Path) -> None:
    """With `artifacts: all` an offline run holds where each checkpoint lies, and not its bytes."""
    from dtp_trainer.storage import open_storage

    storage = open_storage(job.storage.as_uri())
    name = wire.checkpoint_name(7, 1)
    entry = wire.CheckpointEntry(name, 7, 1, 1, 1, 1.0, 10, {"loss": 0.5})
    head = wire.CheckpointHead(1, None, (entry,))
    storage.write(wire.HEAD_KEY, wire.encode_object(head))
    storage.write(f"checkpoints/{name}/rank", b"0123456789")
    script = tmp_path / "upload.py"
    script.write_text(UPLOAD)
    _run_python(script, job.storage.as_uri(), str(tmp_path), job.id, name)
    (file,) = wandb_files(job)
    (artifact,) = [record["artifact"] for record in rows_of(file) if "artifact" in record]
    assert artifact["type"] == "model"
    assert set(artifact["aliases"]) == {"step-7", "latest", "best"}
    contents = artifact["manifest"]["contents"]
    assert [one["ref"] for one in contents] == [f"{job.storage.as_uri()}/checkpoints/{name}/rank"]


UPLOAD = """
import sys
from pathlib import Path
from dtp_trainer.trackers.tracker import About
from dtp_trainer.trackers.turn import Standing
from dtp_trainer.trackers.wandb import WeightsAndBiases
storage, scratch, job, name = sys.argv[1:]
about = About(job, "job", 1, 1, 0, 0, storage, scratch, {"wandb": {"artifacts": "all"}}, {},
    {"keep_best": "loss"})
tracker = WeightsAndBiases(about, print, Standing())
tracker.checkpoint(name)
tracker.close(None)
"""


def _run_python(script: Path, *args: str) -> None:
    import subprocess
    import sys

    from dtp_trainer.trackers.wandb import environment

    env = {**os.environ, "WANDB_API_KEY": "", **environment(script.parent)}
    subprocess.run([sys.executable, "-P", str(script), *args], check=True, env=env, timeout=60)
