"""A warm process that forks savers: ``save_until_killed.py URI``, a generation a line on stdin.

Each saver is two ranks in one process. It goes on from the newest checkpoint and saves every step
until it is killed, saying ``committed STEP``; its parent says ``saver PID`` and ``dead``.
"""

from __future__ import annotations

import os
import sys

import torch

from dtp_trainer.checkpoints.checkpoint import (
    Checkpointer,
    Outcome,
    SaveReport,
    StateBundle,
    load_newest,
)
from dtp_trainer.checkpoints.heads import Retention
from dtp_trainer.checkpoints.pieces import Piece
from dtp_trainer.storage import open_storage

ELEMENTS, PIECE_ELEMENTS = 300_000, 50_000


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def said(report: SaveReport) -> None:
    if report.outcome is Outcome.COMMITTED:
        say(f"committed {report.step}")


def bundle(step: int, rank: int) -> StateBundle:
    """Every number in it is the step, so that a mixture of two steps cannot go unseen."""
    shared: dict[str, object] = {n: torch.full((ELEMENTS,), float(step)) for n in ("a", "b")}
    half = torch.full((PIECE_ELEMENTS // 2,), float(step))
    shared["c"] = Piece((PIECE_ELEMENTS,), half.dtype, rank * len(half), half)
    return StateBundle({**shared, "step": step}, {"step": torch.tensor(step), "rank": rank})


def save_for_ever(uri: str, generation: int) -> None:
    storage = open_storage(uri)
    loaded = load_newest(storage, world_size=2)
    step = loaded.step if loaded else 0
    ranks = [
        Checkpointer(
            storage,
            generation=generation,
            attempt=1,
            rank=rank,
            world_size=2,
            policy=Retention(keep=2),
            on_report=said,
        )
        for rank in range(2)
    ]
    while True:
        step += 1
        for rank in (1, 0):
            ranks[rank].save(bundle(step, rank), step=step, epoch=0, values={}, data_state={})


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    say("ready")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            save_for_ever(sys.argv[1], int(line))
        say(f"saver {pid}")
        os.waitpid(pid, 0)
        say("dead")


if __name__ == "__main__":
    main()
