"""What a worker uses of its machine: CPU, memory, and its GPUs where NVML answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil

from dtp_trainer.wire import Host
from dtp_trainer.worker.gpus import Gpus, open_gpus, read_gpus

SAMPLE_S = 1.0
FAMILY_S = 5.0
"""How often the tree of processes is looked up anew."""
SHARE_S = 10.0
"""How often the kernel is asked how much of a process's memory is shared; it walks all pages."""


class HostSampler:
    """Threads that sample about once a second and hand each `Host` to `deliver`.

    roots: the processes whose trees belong to the worker, asked each time. deliver: called in the
    sampling thread.
    """

    def __init__(
        self,
        worker: int,
        *,
        roots: Callable[[], Iterable[int]],
        deliver: Callable[[Host], None],
        env: Mapping[str, str],
    ) -> None:
        self._worker, self._roots, self._deliver = worker, roots, deliver
        self._family = Family()
        self._gpus = Gpus()
        self._visible = env.get("CUDA_VISIBLE_DEVICES")
        self._stop = threading.Event()

    def start(self) -> None:
        # Apart from each other: a driver that hangs must not end the other numbers.
        for work in (self._sample_always, self._watch_gpus):
            threading.Thread(target=work, daemon=True, name=work.__name__).start()

    def stop(self) -> None:
        self._stop.set()

    def _sample_always(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            with contextlib.suppress(psutil.Error, OSError):
                self._deliver(self._sample())

    def _sample(self) -> Host:
        cpu_percent, memory_bytes = self._family.use(self._roots())
        gpus = self._gpus
        return Host(
            at=time.time(),
            worker=self._worker,
            cpu_percent=round(cpu_percent, 1),
            memory_bytes=memory_bytes,
            memory_total_bytes=memory_limit(),
            gpu_percent=gpus.percent,
            gpu_memory_bytes=gpus.memory_bytes,
            gpu_memory_total_bytes=gpus.memory_total_bytes,
            gpu_watts=gpus.watts,
            gpu_celsius=gpus.celsius,
            gpu_sm_mhz=gpus.sm_mhz,
            gpu_pcie_rx_bytes_per_s=gpus.pcie_rx_bytes_per_s,
            gpu_pcie_tx_bytes_per_s=gpus.pcie_tx_bytes_per_s,
        )

    def _watch_gpus(self) -> None:
        if self._visible == "":
            return
        with contextlib.suppress(Exception):  # silent wherever the driver is not as we expect
            nvml, handles = open_gpus(self._visible)
            while not self._stop.wait(SAMPLE_S):
                self._gpus = read_gpus(nvml, handles)
        self._gpus = Gpus()


class Family:
    """The processes below some roots, and what they use."""

    def __init__(self) -> None:
        self._members: dict[int, _Member] = {}
        self._found_at = float("-inf")
        self._roots: frozenset[int] = frozenset()
        self._used_at = time.monotonic()

    def use(self, roots: Iterable[int]) -> tuple[float, int]:
        """CPU percent since the last call (100 = one core) and bytes of memory now."""
        self._find(frozenset(roots))
        now = time.monotonic()
        elapsed, self._used_at = now - self._used_at, now
        seconds = memory = 0.0
        for pid, member in list(self._members.items()):
            try:
                seconds += member.cpu_seconds()
                memory += member.memory_bytes(now)
            except psutil.Error:
                del self._members[pid]
        return (100 * seconds / elapsed if elapsed > 0 else 0.0), int(memory)

    def _find(self, roots: frozenset[int]) -> None:
        now = time.monotonic()
        if roots == self._roots and now - self._found_at < FAMILY_S:
            return
        self._roots, self._found_at = roots, now
        pids = _descendants(roots)
        self._members = {
            pid: member for pid in pids if (member := self._members.get(pid) or _member(pid))
        }


class _Member:
    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._cpu_seconds = self._total()
        self._share = 1.0
        self._shared_at = float("-inf")

    def cpu_seconds(self) -> float:
        """Since the last call."""
        before, self._cpu_seconds = self._cpu_seconds, self._total()
        return max(0.0, self._cpu_seconds - before)

    def memory_bytes(self, now: float) -> float:
        resident: int = self._process.memory_info().rss
        if now - self._shared_at >= SHARE_S:
            self._shared_at = now
            self._share = _proportion(self._process.pid, resident)
        return resident * self._share

    def _total(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def _member(pid: int) -> _Member | None:
    try:
        return _Member(psutil.Process(pid))
    except psutil.Error:
        return None


def _descendants(roots: Iterable[int]) -> set[int]:
    """The roots and everything below them; one pass over the processes of the machine."""
    children: dict[int, list[int]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            children.setdefault(process.ppid(), []).append(process.pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


def _proportion(pid: int, resident: int) -> float:
    """Of the resident pages, what is this process's own when shared ones are divided by sharers."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:") and resident:
                return min(1.0, int(line.split()[1]) * 1024 / resident)
    return 1.0


def memory_limit() -> int:
    """Of this worker: of its control group where one is set, else of the machine."""
    total: int = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def listens(pids: Iterable[int], port: int) -> bool:
    """Whether one of these processes has a server at `port`."""
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False
