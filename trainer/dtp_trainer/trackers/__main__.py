"""The process beside an agent that feeds trackers: an `About`, then records, on its stdin.

Lines for people go to its stdout. The end of stdin is the end: after the attempt's `Exit`, or
without one when another process goes on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import assert_never

from dtp_trainer import wire
from dtp_trainer.storage import StorageError, open_storage
from dtp_trainer.trackers.course import Back, Course
from dtp_trainer.trackers.tracker import About, Row, Say, Tracker, parse_about
from dtp_trainer.trackers.turn import CHECK_S, Standing, Superseded, Turn

END_S = 60.0
"""After the end of stdin; W&B may have rows to send."""
_WAITING_LINES = 10_000

TITLES = {"wandb": "W&B", "tensorboard": "TensorBoard"}


class Tracking:
    """Hands what is heard to every tracker that still works."""

    def __init__(self, about: About, standing: Standing, say: Say) -> None:
        self._say = say
        self._course = Course(standing.began)
        self._standing = standing
        self._trackers: dict[str, Tracker] = {}
        for name in about.trackers:
            try:
                self._trackers[name] = open_tracker(name, about, standing, say)
            except Exception as error:  # noqa: BLE001 - whatever a library raises; the job goes on
                self._complain(name, error)

    @property
    def standing(self) -> Standing:
        return Standing(max(self._course.step, self._standing.step), self._course.began)

    def hear(self, record: wire.Record) -> None:
        match record:
            case wire.Window(rank=0):
                for item in self._course.window(record):
                    self._give(item)
            case wire.Window():
                pass  # of another worker, about the same steps
            case wire.Host():
                self._give_machines(self._course.host(record))
            case wire.GangEvent():
                self._hear_event(record)
            case wire.Exit():
                pass
            case _:
                assert_never(record)

    def tick(self) -> None:
        self._each(lambda tracker: tracker.tick())

    def close(self, ending: wire.Exit | None) -> None:
        for row in self._course.flush():
            self._give(row)
        self._give_machines(self._course.flush_machines(time.time()))
        self._each(lambda tracker: tracker.close(ending))

    def _give(self, item: Row | Back) -> None:
        match item:
            case Row():
                self._each(lambda tracker: tracker.log(item))
            case Back(step):
                self._each(lambda tracker: tracker.go_back(step))

    def _give_machines(self, rows: Iterable[Row]) -> None:
        for one in rows:
            self._each(partial(_log_machines, one))

    def _hear_event(self, event: wire.GangEvent) -> None:
        if event.name == "checkpoint":
            name = event.text.removeprefix("checkpoint ").split(",")[0]
            self._each(lambda tracker: tracker.checkpoint(name))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - see above
                self._complain(name, error)
                del self._trackers[name]

    def _complain(self, name: str, error: Exception) -> None:
        first = (str(error).splitlines() or [""])[0]
        self._say(f"{TITLES[name]}: stopped ({type(error).__name__}: {first}); training goes on")


def _log_machines(row: Row, tracker: Tracker) -> None:
    tracker.log_machines(row)


def open_tracker(name: str, about: About, standing: Standing, say: Say) -> Tracker:
    """Whatever a library raises; `ImportError` says what to install."""
    if name == "tensorboard":
        from dtp_trainer.trackers.tensorboard import TensorBoard  # noqa: PLC0415 - only where used

        return TensorBoard(about, say)
    if name != "wandb":
        raise ValueError(f"there is no tracker {name!r}")
    from dtp_trainer.trackers.wandb import WeightsAndBiases, environment  # noqa: PLC0415

    for key, value in environment(Path(about.scratch)).items():
        os.environ.setdefault(key, value)
    try:
        return WeightsAndBiases(about, say, standing)
    except ImportError as error:
        raise ImportError(f"{error}; in the worker's environment: pip install wandb") from error


def follow(tracking: Tracking, turn: Turn, lines: queue.Queue[str | None]) -> None:
    """Until the end of the lines. Raises `Superseded`."""
    ending: wire.Exit | None = None
    checked_at = time.monotonic()
    try:
        while (line := _next(lines)) is not None:
            record = wire.parse(line) if line else None
            if isinstance(record, wire.Exit):
                ending = record
            elif record is not None and not isinstance(record, wire.Text):
                tracking.hear(record)
            if time.monotonic() - checked_at >= CHECK_S:
                checked_at = time.monotonic()
                tracking.tick()
                turn.keep(tracking.standing)
    finally:
        _die_in_time()
        tracking.close(ending)
        turn.leave(tracking.standing)


def _next(lines: queue.Queue[str | None]) -> str | None:
    """Empty when none came for a while."""
    try:
        return lines.get(timeout=CHECK_S)
    except queue.Empty:
        return ""


def _die_in_time() -> None:
    timer = threading.Timer(END_S, os._exit, [1])
    timer.daemon = True
    timer.start()


def _read(lines: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # an agent that was killed listens no more
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    about = parse_about(sys.stdin.readline())
    lines: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
    threading.Thread(target=_read, args=[lines], daemon=True).start()
    turn = Turn(open_storage(about.storage), about.token)
    try:
        follow(Tracking(about, turn.take(), say), turn, lines)
    except Superseded:
        return 0
    except StorageError as error:
        say(f"trackers: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
