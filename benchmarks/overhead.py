"""What `Session` with everything on costs a step, beside the bare loop, Hugging Face accelerate and
Lightning Fabric: blocks interleaved in one process, two ranks."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import HERE, save, spread
from dtp_trainer.wire import Env

SCRIPT = HERE / "scripts" / "overhead.py"
BLOCKS = int(os.environ.get("DTP_BENCH_BLOCKS", "60"))
BLOCK_STEPS = 8
CHECKPOINT_BLOCKS = 8
"""One block of the session in so many has a checkpoint in it."""


def rank_environment(rank: int, port: int, folder: Path) -> dict[str, str]:
    """What an agent would give to one of two ranks."""
    every = BLOCK_STEPS * CHECKPOINT_BLOCKS
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "overhead",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        Env.JOB_ID: "overhead",
        Env.ATTEMPT: "1",
        Env.GENERATION: "1",
        Env.WORKER: "0",
        Env.STORAGE: (folder / "storage").as_uri(),
        Env.STEPS_FILE: str(folder / f"steps{rank}"),
        Env.CHECKPOINT: json.dumps({"every_s": None, "every_steps": every, "keep": 3}),
        Env.DATA: "{}",
    }


def measured() -> dict[str, list[float]]:
    """Contender → seconds a step of each of its blocks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = folder / "result.json"
        ranks = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(result), str(BLOCKS)],
                env=rank_environment(rank, port, folder),
            )
            for rank in range(2)
        ]
        if any(rank.wait() for rank in ranks):
            sys.exit("a rank of the overhead benchmark failed")
        found: dict[str, list[float]] = json.loads(result.read_text())
    return found


def beside(times: Sequence[float], bare: Sequence[float]) -> dict[str, Any]:
    """Of two contenders' blocks, pair by pair, and of all their time: checkpoints fall into few
    blocks, which a median does not see."""
    ratios = sorted(one / other for one, other in zip(times, bare, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio_of_medians": round(statistics.median(times) / statistics.median(bare), 4),
        "median_of_paired_ratios": round(statistics.median(ratios), 4),
        "quartiles_of_paired_ratios": [round(low, 4), round(high, 4)],
        "ratio_of_totals": round(sum(times) / sum(bare), 4),
    }


def main() -> None:
    times = measured()
    others = {name: beside(found, times["bare"]) for name, found in times.items() if name != "bare"}
    save(
        "overhead",
        {
            "step_s": {name: spread(found) for name, found in times.items()},
            "beside_bare": others,
            "ratio_of_medians": others["session"]["ratio_of_medians"],
            "median_of_paired_ratios": others["session"]["median_of_paired_ratios"],
            "checkpoint_every_steps": BLOCK_STEPS * CHECKPOINT_BLOCKS,
            "goal": 1.01,
        },
    )
