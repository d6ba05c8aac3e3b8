"""Unix time that never jumps: the wall clock when this process began, plus the time since."""

from __future__ import annotations

import time

_ORIGIN = time.time() - time.monotonic()


def now() -> float:
    """Unix seconds."""
    return _ORIGIN + time.monotonic()
