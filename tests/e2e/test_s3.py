"""A whole job whose storage is a bucket: nothing of it depends on a folder that workers share."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

EXACT = Path(__file__).parent / "scripts" / "exact.py"

SERVER = """
import sys
from moto.server import ThreadedMotoServer
import boto3, logging
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
url = "http://%s:%d" % server.get_host_and_port()
boto3.client("s3", endpoint_url=url).create_bucket(Bucket="jobs")
print(url, flush=True)
sys.stdin.read()
"""

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture
def bucket(dtp: Any) -> Iterator[str]:
    """New jobs of this dtp keep their checkpoints there."""
    server = Popen(
        [sys.executable, "-P", "-c", SERVER],
        env={**os.environ, **CREDENTIALS},
        stdin=PIPE,
        stdout=PIPE,
        text=True,
    )
    assert server.stdin
    assert server.stdout
    url = server.stdout.readline().strip()
    uri = "s3://jobs/team"
    dtp.env |= {**CREDENTIALS, "AWS_ENDPOINT_URL": url, "DTP_STORAGE_ROOT": uri}
    yield uri
    server.communicate("", timeout=20)


@pytest.mark.slow
def test_a_job_in_s3_is_paused_checked_and_resumed(
    dtp: Any, bucket: str, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Two workers train, checkpoint, pause, resume and end with head, gang and checkpoints in a
    bucket and not a byte of them in the state folder."""
    notes = tmp_path / "notes"
    notes.mkdir()
    env = {"NOTES": str(notes), "EPOCHS": "20", "PACE": "0.02"}
    path = job_file(EXACT.read_text(), nodes=2, env=env, checkpoint={"every": "50 steps"})
    dtp.run("run", "--detach", path)
    name = path.stem
    dtp.until(lambda: dtp.rows("ckpt", "ls", name), "the first checkpoint")
    dtp.run("pause", name)
    dtp.run("wait", name, code=8)
    paused = dtp.job(name)
    assert paused["checkpoint"]["step"] == paused["step"]
    began = time.monotonic()
    dtp.run("resume", name)
    dtp.run("wait", name)
    assert time.monotonic() - began < 90
    ended = dtp.job(name)
    assert (ended["state"], ended["step"]) == ("SUCCEEDED", 400)
    steps = [int(line.split()[0]) for line in (notes / "rank0.txt").read_text().splitlines()]
    assert steps == list(range(1, 401))
    assert not (dtp.home / "storage").exists()
    assert json.dumps(dtp.rows("ckpt", "ls", name)).count("step-") >= 2
