"""What a worker uses of its machine."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import psutil

from dtp_trainer.gang.ports import HeldPort
from dtp_trainer.wire import Host
from dtp_trainer.worker.hosts import Family, HostSampler, listens, memory_limit

BUSY = (
    "import subprocess, sys; x = bytearray(80_000_000); print('up', flush=True)\nwhile True: pass"
)


def test_busy_child_is_seen() -> None:
    """CPU and memory are those of the whole tree of processes."""
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}])"
    with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        family = Family()
        family.use([process.pid])
        time.sleep(0.5)
        cpu_percent, memory_bytes = family.use([process.pid])
        for member in psutil.Process(process.pid).children():
            member.kill()
    assert cpu_percent > 5
    assert memory_bytes > 60_000_000


def test_vanished_process_counts_nothing() -> None:
    """A process that ended between two looks is left out."""
    process = subprocess.Popen(["sleep", "100"])
    family = Family()
    family.use([process.pid])
    process.kill()
    process.wait()
    assert family.use([process.pid]) == (0.0, 0)


def test_samples_come_by_themselves() -> None:
    """A sampler delivers about one sample a second until it is stopped."""
    found: list[Host] = []
    came = threading.Event()

    def deliver(host: Host) -> None:
        found.append(host)
        came.set()

    sampler = HostSampler(3, roots=lambda: [1], deliver=deliver, env={"CUDA_VISIBLE_DEVICES": ""})
    sampler.start()
    assert came.wait(20)
    sampler.stop()
    assert found[0].worker == 3
    assert 0 < found[0].memory_bytes < found[0].memory_total_bytes == memory_limit()
    assert found[0].gpu_percent == ()


def test_held_port_can_be_served() -> None:
    """A rank can listen at the port that its agent holds; only then somebody listens there."""
    code = (
        "import socket, sys; s = socket.socket();"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1);"
        "s.bind(('', int(sys.argv[1]))); s.listen(); print('up', flush=True); sys.stdin.read()"
    )
    with (
        HeldPort() as held,
        subprocess.Popen(
            [sys.executable, "-c", code, str(held.number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as server,
    ):
        assert not listens([1], held.number)
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        assert listens([server.pid], held.number)
        server.kill()
