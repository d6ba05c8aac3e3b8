"""Who drives, as told from a lease."""

import subprocess
import sys

import psutil

from dtp_engine.driver import holder_name, is_alive, pid_of


def test_a_dead_process_that_nobody_waited_for_does_not_drive() -> None:
    """A client is the parent of the controller that it started; killed, it lingers as a zombie."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = holder_name(process.pid)
    assert pid_of(holder) == process.pid
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert pid_of(holder) is None
    assert is_alive(holder) is False
    process.communicate()


def test_a_reused_pid_is_another_holder() -> None:
    """The start time is a part of the name."""
    host, pid, _ = holder_name(psutil.Process().pid).rsplit(":", 2)
    assert is_alive(f"{host}:{pid}:1.00") is False


def test_only_its_lease_speaks_for_a_holder_elsewhere() -> None:
    """A process of another machine can be neither seen nor declared dead."""
    assert is_alive("elsewhere:1:1.00") is None
