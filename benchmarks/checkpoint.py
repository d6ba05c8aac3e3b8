"""What saving a large state costs a training loop, beside `torch.save` and DCP; and restoring it.

blocked: how long the save keeps the loop. lost: blocked, and by how much the steps until it is
durable are slower. durable: from the call until it would survive the end of the machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import HERE, save, spread

SIZES_GB = (0.6, 1.2)
ROUNDS = 3
RESHARDS = ((1, 1), (1, 2), (2, 1), (2, 3))
_WITHIN_S = 240.0
SCRIPT = HERE / "scripts" / "stall.py"

Found = dict[str, list[dict[str, float]]]


def main() -> None:
    save("checkpoint", measured(SIZES_GB, ROUNDS))


def measured(sizes_gb: Sequence[float], rounds: int) -> dict[str, Any]:
    costs: dict[str, Any] = {}
    restored: dict[str, Any] = {}
    for gigabytes in sizes_gb:
        for world in (1, 2):
            with tempfile.TemporaryDirectory(prefix="dtp-stall") as folder:
                found = _run("save", world, Path(folder), gigabytes, rounds)
                costs[f"{gigabytes} GB, {_ranks(world)}"] = _costs(found)
                for before, after in RESHARDS:
                    if before == world and gigabytes == sizes_gb[0]:
                        found = _run("restore", after, Path(folder), gigabytes, rounds)
                        restored[f"{gigabytes} GB, {before} to {_ranks(after)}"] = {
                            name: spread([each["seconds"] for each in seconds])
                            for name, seconds in found.items()
                        }
    return {"rounds": rounds, "saves": costs, "restore_s": restored}


def _costs(found: Found) -> dict[str, Any]:
    kinds = ("blocked_s", "lost_s", "durable_s")
    spreads = {
        name: {kind: spread([each[kind] for each in costs]) for kind in kinds}
        for name, costs in found.items()
    }
    return {**spreads, "dtp_to": _ratios(spreads)}


def _ratios(spreads: Mapping[str, Any]) -> dict[str, float]:
    """Of medians; the best mode of DCP is the one that loses least."""

    def median(name: str, kind: str) -> float:
        found: float = spreads[name][kind]["median"]
        return found

    best = min(median(name, "lost_s") for name in spreads if name.startswith("dcp"))
    return {
        "blocked, torch.save": round(
            median("dtp", "blocked_s") / median("torch.save", "blocked_s"), 3
        ),
        "lost, torch.save": round(median("dtp", "lost_s") / median("torch.save", "lost_s"), 3),
        "lost, best of DCP": round(median("dtp", "lost_s") / best, 3) if best > 0 else float("inf"),
    }


def _run(what: str, world: int, folder: Path, gigabytes: float, rounds: int) -> Found:
    """`world` processes of the script; what its rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    argv = [sys.executable, str(SCRIPT), what, str(folder), str(gigabytes), str(rounds)]
    ranks = [
        subprocess.Popen(argv, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        outs = [rank.communicate(timeout=_WITHIN_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        raise RuntimeError(f"{what} with {_ranks(world)} ended with {codes}")
    found: Found = json.loads(outs[0].splitlines()[-1])
    return found


def _ranks(world: int) -> str:
    return f"{world} rank" if world == 1 else f"{world} ranks"


if __name__ == "__main__":
    main()
