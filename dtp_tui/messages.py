"""What reaches the screens: frozen pictures of the engine, and the messages that carry them.

Also the one message that goes the other way: `VerbChosen`, what the operator would like to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from textual.message import Message

from dtp_engine.backend import Capacity
from dtp_engine.driver import Driver
from dtp_engine.jobs import Attempt, Event
from dtp_engine.series import MetricHistory
from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_tui.widgets.log_buffer import LogEntry


@dataclass(frozen=True, slots=True)
class ClusterPicture:
    """Everything the header and the jobs table know."""

    at: datetime
    """When the engine was last asked with success."""
    now: datetime
    jobs: tuple[JobView, ...] = ()
    capacity: Capacity | None = None
    driver: Driver | None = None
    problem: str = ""
    """Why the newest look failed; the rest is then what was seen before."""


@dataclass(frozen=True, slots=True)
class JobPicture:
    """Everything the job screen knows, its log lines apart. `history` goes on growing."""

    now: datetime
    view: JobView
    history: MetricHistory
    revision: int
    """Of `history` when the picture was taken."""
    attempts: tuple[Attempt, ...] = ()
    events: tuple[Event, ...] = ()
    checkpoints: tuple[wire.CheckpointEntry, ...] = ()


class Verb(StrEnum):
    """What the operator can change; each asks first."""

    PAUSE = "pause"
    RESUME = "resume"
    SCALE = "scale"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Wish:
    """A confirmed verb."""

    verb: Verb
    job_id: str
    job_name: str
    workers: int | None = None
    """SCALE."""
    from_step: int | None = None
    """RESUME: None = from the newest good checkpoint."""


class ClusterPolled(Message):
    def __init__(self, picture: ClusterPicture) -> None:
        super().__init__()
        self.picture = picture

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, ClusterPolled)


class JobPolled(Message):
    def __init__(self, picture: JobPicture) -> None:
        super().__init__()
        self.picture = picture

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, JobPolled)


class LinesArrived(Message):
    """Never replaced: each line comes once."""

    def __init__(self, job_id: str, lines: tuple[LogEntry, ...], *, anew: bool) -> None:
        super().__init__()
        self.job_id = job_id
        self.lines = lines
        self.anew = anew
        """What was shown before is to be forgotten: the log is read from its beginning."""


class VerbChosen(Message):
    """Nothing has happened yet: the app asks before it does anything."""

    def __init__(self, verb: Verb, view: JobView) -> None:
        super().__init__()
        self.verb = verb
        self.view = view
