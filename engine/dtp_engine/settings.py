"""Where dtp keeps its state and how it behaves on this machine: environment over config file over
defaults, one frozen object."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    home: Path
    """State: ledger, storage, worker folders, sockets. `DTP_HOME`."""
    actor: str
    """Who asks; written beside every request. `DTP_ACTOR`."""
    backend: str = "local"
    controller_idle_s: float = 300.0
    """The background controller leaves when nothing has been active for so long.
    `DTP_CONTROLLER_IDLE`."""
    zygote_idle_s: float = 300.0
    """A warm process leaves when no job has used it for so long. `DTP_ZYGOTE_IDLE`."""
    lease_ttl_s: float = 20.0
    """A lease that has not moved for so long, as seen by the reader's own clock, may be taken
    over."""


def default_home() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("DTP_HOME") or Path(state) / "dtp")
