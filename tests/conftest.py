"""What all tests need of the process that runs them."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Of a shell that runs the tests in the background; every program they start would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
