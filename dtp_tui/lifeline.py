"""Ends the process when its terminal is gone, or when leaving takes too long.

Textual writes to the terminal on a thread of its own, through a short queue. Once the terminal has
vanished that thread is dead, the queue fills, and the event loop waits for it for ever: nothing
that runs on the loop could notice. So this is watched from another thread. Ending at once is safe:
a client only writes whole requests to the ledger, and no job depends on it.
"""

from __future__ import annotations

import os
import termios
import threading
import time

LOOK_S = 1.0
GONE = 129
"""128 + SIGHUP, as a shell would report it."""


class Lifeline(threading.Thread):
    """Watches the terminal behind a file descriptor."""

    def __init__(self, terminal: int, *, look_s: float = LOOK_S) -> None:
        super().__init__(name="dtp-lifeline", daemon=True)
        self._terminal = terminal
        self._look_s = look_s
        self._leave_at: float | None = None
        self._exit_code = GONE

    def leave_within(self, seconds: float, exit_code: int) -> None:
        """End the process then, if it has not ended by itself."""
        self._exit_code = exit_code
        self._leave_at = time.monotonic() + seconds

    def run(self) -> None:
        while True:
            if self._leave_at is not None and time.monotonic() >= self._leave_at:
                os._exit(self._exit_code)
            if not is_there(self._terminal):
                os._exit(GONE)
            time.sleep(self._look_s)


def is_there(terminal: int) -> bool:
    """Whether somebody still holds the other end."""
    try:
        termios.tcgetattr(terminal)
    except (OSError, termios.error):
        return False
    return True
