"""What `Session` costs a step, beside the bare loop: blocks interleaved in one process, two
ranks."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import HERE, save, spread
from dtp_trainer.wire import Env

SCRIPT = HERE / "scripts" / "overhead.py"


def rank_environment(rank: int, port: int, folder: Path) -> dict[str, str]:
    """What an agent would give to one of two ranks."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        Env.JOB_ID: "overhead",
        Env.ATTEMPT: "1",
        Env.GENERATION: "1",
        Env.WORKER: "0",
        Env.STORAGE: (folder / "storage").as_uri(),
        Env.STEPS_FILE: str(folder / f"steps{rank}"),
        Env.CHECKPOINT: json.dumps({"every_s": None, "every_steps": None, "keep": 3}),
        Env.DATA: "{}",
    }


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = folder / "result.json"
        ranks = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(result)], env=rank_environment(rank, port, folder)
            )
            for rank in range(2)
        ]
        if any(rank.wait() for rank in ranks):
            sys.exit("a rank of the overhead benchmark failed")
        times = json.loads(result.read_text())
    pairs = zip(times["bare"], times["session"], strict=True)
    ratios = sorted(session / bare for bare, session in pairs)
    save(
        "overhead",
        {
            "step_s": {name: spread(found) for name, found in times.items()},
            "ratio_of_medians": round(
                statistics.median(times["session"]) / statistics.median(times["bare"]), 4
            ),
            "median_of_paired_ratios": round(statistics.median(ratios), 4),
            "goal": 1.01,
        },
    )
