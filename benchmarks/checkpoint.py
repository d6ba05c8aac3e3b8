"""What a checkpoint of 300 MB costs, beside `torch.save`: seconds a GB, interleaved, warm."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import interleaved, save, spread
from dtp_trainer.checkpoints.checkpoint import Checkpointer, SaveReport, StateBundle, load_newest
from dtp_trainer.checkpoints.heads import Retention
from dtp_trainer.storage import FileStorage

ROUNDS = 7
LAYERS = 24


class Contest:
    """One model with its optimizer, saved by each of the contenders in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.storage = folder, FileStorage(folder / "storage")
        self.model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(LAYERS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.randn(4, 1024)).sum().backward()
        self.optimizer.step()
        self.checkpointer = Checkpointer(
            self.storage,
            generation=1,
            attempt=1,
            rank=0,
            world_size=1,
            policy=Retention(keep=2),
        )
        self.reports: list[SaveReport] = []
        self.checkpointer.prepare(StateBundle(self.state()))
        self.saved()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def saved(self) -> float:
        """Seconds to a committed checkpoint; old ones are given up outside the time."""
        report = self.checkpointer.save(
            StateBundle(self.state()),
            step=len(self.reports),
            epoch=0,
            values={},
            data_state={},
            blocking=True,
        )
        assert report
        assert report.entry
        self.reports.append(report)
        return report.durable_s

    def torch_saved(self) -> float:
        """As careful scripts do it: a temporary file, fsync, rename."""
        began = time.perf_counter()
        unfinished = self.folder / "state.tmp"
        with unfinished.open("wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self.folder / "state.pt")
        return time.perf_counter() - began

    def loaded(self) -> float:
        began = time.perf_counter()
        assert load_newest(self.storage)
        return time.perf_counter() - began

    def torch_loaded(self) -> float:
        began = time.perf_counter()
        torch.load(self.folder / "state.pt", weights_only=True)
        return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        contest = Contest(Path(name))
        contenders = {
            "durable": contest.saved,
            "torch_save": contest.torch_saved,
            "load_verified": contest.loaded,
            "torch_load": contest.torch_loaded,
        }
        seconds = interleaved(contenders, ROUNDS)
        contest.checkpointer.close()
    gigabytes = contest.reports[-1].bytes / 1e9
    seconds["blocked"] = [report.blocked_s for report in contest.reports[1:]]
    figures = {
        f"{what}_s_per_gb": spread([second / gigabytes for second in found])
        for what, found in seconds.items()
    }
    save("checkpoint", {"state_gb": round(gigabytes, 3), **figures})


if __name__ == "__main__":
    main()
