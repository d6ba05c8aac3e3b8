"""Whether a checkpoint fits into the time between SIGTERM and SIGKILL. Pure, free of torch."""

from __future__ import annotations

import math

from dtp_trainer.wire import CheckpointEntry

RANKS_SHARE = 0.9
"""Ranks are killed when this much of the grace is over; the rest is for the last words."""
MOST_S = 120
"""What a spot machine gives after its notice, and ECS at most."""
_ROOM = 1.3
"""A checkpoint takes longer when the machines are busy with leaving."""
_STEP_S = 30


def too_short(entry: CheckpointEntry, grace_s: float) -> str | None:
    """One line that says what to do, when one like `entry` takes longer than a stop may.

    >>> slow = CheckpointEntry("step-000009.g0001", 9, 1, 1, 2, 0.0, 1_288_490_189, seconds=41.0)
    >>> too_short(slow, 30.0)
    'a checkpoint of 1.2 GiB takes about 41 s here, stop_grace is 30s: raise stop_grace to 60s'
    >>> too_short(slow, 60.0)
    """
    if entry.seconds is None or entry.seconds <= RANKS_SHARE * grace_s:
        return None
    wanted = math.ceil(entry.seconds * _ROOM / RANKS_SHARE / _STEP_S) * _STEP_S
    more = f", or make it smaller: spot gives {MOST_S} s at most" if wanted > MOST_S else ""
    return (
        f"a checkpoint of {size(entry.bytes)} takes about {span(entry.seconds)} here, stop_grace "
        f"is {grace_s:g}s: raise stop_grace to {wanted}s{more}"
    )


def span(seconds: float) -> str:
    """
    >>> span(0.229), span(3.0), span(41.4)
    ('0.23 s', '3 s', '41 s')
    """
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """
    >>> size(512), size(16_180), size(3_880_000)
    ('512 B', '15.8 KiB', '3.7 MiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1023.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
