"""Standard streams that the caller closed (``dtp ps >&-``)."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Read nothing from them, write nowhere: after this each of the three is there.

    Called before any other file is opened: a ledger that was given the number of a closed stdout
    would be written to by whoever is started with it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)  # noqa: FBT003 - positional only
            stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
