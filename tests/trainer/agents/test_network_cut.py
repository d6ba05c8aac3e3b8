"""Workers on hosts of their own (network namespaces) whose network is cut, and a leader that
stands still: at most one generation goes on, and what it learns is what it would have learned."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtp_trainer import wire
from tests.trainer.agents.conftest import Job, Worker

SCRIPT = """
import os, time
from pathlib import Path
import torch
from dtp_trainer.session import Session

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(64, 2000), torch.nn.Tanh(), torch.nn.Linear(2000, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
session = Session(model=net, optimizer=optimizer)
model = session.ddp(net)
generation = os.environ.get("DTP_GENERATION", "0")
notes = Path(os.environ["NOTES"]) / f"g{generation}.r{session.rank}"
slowly = notes.with_name("slowly")
data = [torch.sin(torch.arange(64.0) + i) for i in range(32)]
for batch in session.batches(data, global_batch=4, steps=int(os.environ["STEPS"])):
    loss = (model(batch).squeeze(1) - batch.sum(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    whole = session.sum(loss.detach()[None]).item() / session.world_size
    with notes.open("a") as file:
        file.write(f"{session.global_step + 1} {whole}\\n")
    if slowly.exists():
        time.sleep(0.05)
    session.step(loss=loss)
session.finish()
"""
STEPS = 600

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def ip(*words: str, check: bool = True) -> bool:
    command = ["ip", *words]
    return not subprocess.run(command, check=check, capture_output=True, text=True).returncode


class Hosts(Job):
    """A job whose workers have a network each, on one bridge that can be cut."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__(folder)
        self.bridge, self.net = f"dtpb{os.getpid()}", f"10.{80 + number}.{os.getpid() % 250}"
        self.names: list[str] = []

    def host(self, worker: int) -> str:
        return f"{self.net}.{worker + 1}"

    def build(self, workers: int) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        for worker in range(workers):
            name, port = f"{self.bridge}n{worker}", f"{self.bridge}p{worker}"
            ip("netns", "add", name)
            self.names.append(name)
            peer = ("peer", "name", "eth0", "netns", name)
            ip("link", "add", port, "type", "veth", *peer)
            ip("link", "set", port, "master", self.bridge, "up")
            address = f"{self.host(worker)}/24"
            ip("-n", name, "address", "add", address, "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in self.names:
            ip("netns", "del", name, check=False)
        ip("link", "del", self.bridge, check=False)

    def cut(self, worker: int) -> None:
        """Nothing comes through any more, and nobody is told."""
        ip("link", "set", f"{self.bridge}p{worker}", "down")

    def heal(self, worker: int) -> None:
        ip("link", "set", f"{self.bridge}p{worker}", "up")

    def spawn(self, folder: Path) -> subprocess.Popen[bytes]:
        """In the namespace of its worker; as `Job.spawn` otherwise."""
        name = self.names[int(folder.name.removeprefix("w"))]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        agent = [sys.executable, "-P", "-m", "dtp_trainer.agent"]
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", name, *agent],
                env={**os.environ, "PATH": path, wire.Env.LAUNCH: str(folder / "launch.json")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def start(job: Job, workers: int, **each: object) -> list[Worker]:
    (job.work / "train.py").write_text(SCRIPT)
    for name in ("notes", "reference"):
        (job.folder / name).mkdir()
    (job.folder / "notes" / "slowly").touch()
    job.options = {
        "command": ["python", "train.py"],
        "workers": workers,
        "env": environment(job, "notes"),
        "checkpoint": {"every_s": None, "every_steps": 5, "keep": 1000, "keep_best": None},
    }
    for number in range(workers):
        own = {"zygotes": str(job.folder / f"z{number}")}
        if isinstance(job, Hosts):
            own["host"] = job.host(number)
        job.launch(number, **own, **each)
    return job.workers


def environment(job: Job, notes: str) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "STEPS": str(STEPS)}
    gloo = {"GLOO_SOCKET_IFNAME": "eth0"} if isinstance(job, Hosts) else {}
    return {**ours, **gloo, "NOTES": str(job.folder / notes)}


def losses(job: Job, folder: str) -> dict[int, float]:
    """Step → loss of its last execution: that of the newest generation which took it."""
    found: dict[int, float] = {}
    files = sorted((job.folder / folder).glob("g*.r0"), key=lambda p: int(p.stem[1:]))
    for path in files:
        for line in path.read_text().splitlines():
            step, loss = line.split()
            found[int(step)] = float(loss)
    return found


def began(job: Job, generation: int) -> int:
    path = job.folder / "notes" / f"g{generation}.r0"
    return int(path.read_text().split()[0]) - 1


def check_history(job: Job) -> None:
    """Once the job is done: no generation committed behind the place where the next one began, and
    the losses are those of a run that nobody disturbed."""
    (job.folder / "notes" / "slowly").unlink()
    assert job.codes() == [0, 0]
    head = wire.CheckpointHead.from_dict(wire_json(job.storage / wire.HEAD_KEY))
    starts = {int(p.stem[1:]): began(job, int(p.stem[1:])) for p in notes(job)}
    for entry in head.entries:
        later = [step for generation, step in starts.items() if generation > entry.generation]
        assert all(entry.step <= step for step in later), (entry.name, starts)
    env = {**os.environ, **environment(job, "reference"), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "train.py"]
    subprocess.run(command, cwd=job.work, env=env, check=True, capture_output=True)
    found, wanted = losses(job, "notes"), losses(job, "reference")
    assert found == pytest.approx(wanted, rel=1e-3)
    assert len(wanted) == STEPS


def notes(job: Job) -> list[Path]:
    return list((job.folder / "notes").glob("g*.r0"))


def wire_json(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found


def leader(job: Job) -> int:
    gang = job.gang()
    assert gang is not None
    return gang.leader


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts; skipped, with the reason, where namespaces cannot be made."""
    if os.getuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    job = Hosts(tmp_path / "job", 1)
    try:
        try:
            job.build(2)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield job
        for worker in job.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        job.until(lambda: not job.processes(), 10)
    finally:
        job.remove()


def test_cut_and_healed(hosts: Hosts) -> None:
    """Leader and follower cannot reach each other, storage both: one generation of one worker goes
    on, in the midst of commits; once healed both train, to the losses of a run without a cut."""
    start(hosts, 2)
    hosts.until(lambda: hosts.stepped(1, world_size=2), timeout=90)
    first = leader(hosts)
    hosts.cut(first)
    hosts.until(lambda: hosts.stepped(2, world_size=1), timeout=30)
    assert leader(hosts) == first
    other = hosts.workers[1 - first]
    hosts.until(lambda: not [p for p in hosts.processes() if rank_of(p.pid) == other.number], 20)
    hosts.heal(first)
    hosts.until(lambda: hosts.stepped(3, world_size=2), timeout=30)
    check_history(hosts)


def rank_of(pid: int) -> int | None:
    """The worker that a rank belongs to; None for what is no rank."""
    try:
        found = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return None
    number = re.search(r"DTP_WORKER=(\d+)\0", found)
    return int(number[1]) if number else None


def test_frozen_leader(job: Job) -> None:
    """A leader that stands still is succeeded; when it moves again it finds itself deposed, its
    ranks commit nothing more, and it joins."""
    workers = start(job, 2)
    job.until(lambda: job.stepped(1, world_size=2), timeout=90)
    frozen = workers[leader(job)]
    frozen.ask(signal.SIGSTOP)
    job.until(lambda: job.stepped(2, world_size=1), timeout=40)
    assert leader(job) != frozen.number
    frozen.ask(signal.SIGCONT)
    job.until(lambda: job.stepped(3, world_size=2), timeout=30)
    check_history(job)
