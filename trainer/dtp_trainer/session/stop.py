"""SIGTERM means: checkpoint, please, and leave. While training a flag, before that an end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from dtp_trainer.wire import ExitCode


class Paused(SystemExit):
    """A checkpoint is committed, or none was needed; this rank leaves because it was asked to."""

    def __init__(self) -> None:
        super().__init__(int(ExitCode.PAUSED))


class SessionError(SystemExit):
    """The script cannot go on; ends it with 1 and one line on stderr instead of a traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(f"dtp: {text}")


class StopRequest:
    """Whether this process was sent SIGTERM."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def wanted(self) -> bool:
        return self._asked.is_set()

    def listen(self) -> bool:
        """Take SIGTERM over; False, and nothing is changed, outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return False
        signal.signal(signal.SIGTERM, self._on_signal)
        return True

    def wait(self, seconds: float) -> bool:
        """Until asked, at most so long."""
        return self._asked.wait(seconds)

    @contextlib.contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """While the block runs, SIGTERM ends the process with PAUSED.

        A thread hears the signal: a Python handler would wait until the main thread comes back from
        C++, and joining a process group whose other ranks have already left takes a minute.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        listener = threading.Thread(target=_leave_on_sigterm, args=(reader,), daemon=True)
        listener.start()
        try:
            if self.wanted:
                raise Paused
            yield
        finally:
            signal.set_wakeup_fd(previous)
            os.close(writer)
            listener.join()
            os.close(reader)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._asked.set()


def _leave_on_sigterm(reader: int) -> None:
    """Each byte is the number of a signal; no byte: the writing end was closed."""
    while number := os.read(reader, 1):
        if number[0] == signal.SIGTERM:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ExitCode.PAUSED)
