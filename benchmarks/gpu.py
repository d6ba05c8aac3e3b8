"""Tokens a second, MFU and how busy the device is, beside a plain loop on the same GPU; says so and
does nothing where there is no GPU."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import HERE, save, spread
from dtp_trainer.wire import Env

SCRIPT = HERE / "scripts" / "gpt.py"


def measured(*arguments: str) -> dict[str, Any]:
    """What the script found. With storage and a step file, as under an agent."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = folder / "result.json"
        env = {
            **os.environ,
            Env.JOB_ID: "gpu",
            Env.ATTEMPT: "1",
            Env.GENERATION: "1",
            Env.WORKER: "0",
            Env.STORAGE: (folder / "storage").as_uri(),
            Env.STEPS_FILE: str(folder / "steps"),
            Env.CHECKPOINT: json.dumps({"every_s": None, "every_steps": None, "keep": 3}),
        }
        subprocess.run([sys.executable, str(SCRIPT), str(result), *arguments], env=env, check=True)
        found: dict[str, Any] = json.loads(result.read_text())
    return found


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """The script's numbers as they are reported; `mfu` and `busy` only where they are known."""
    steps, tokens = found.pop("step_s"), found["tokens_a_step"]
    told = {name: statistics.median(seconds) for name, seconds in steps.items()}
    speed = {name: round(tokens / step_s, 1) for name, step_s in told.items()}
    peak = found["peak_tflops"]
    busy = found.pop("busy_percent")
    return {
        **found,
        "step_s": {name: spread(seconds) for name, seconds in steps.items()},
        "tokens_per_s": speed,
        "mfu": {
            name: round(rate * found["flops_a_token"] / (peak * 1e12), 4)
            for name, rate in speed.items()
            if peak
        },
        "busy_percent": {name: spread(percent) for name, percent in busy.items() if percent},
        "tokens_beside_plain": round(speed["session"] / speed["plain"], 4),
        "goal": {"tokens_beside_plain": 1.0, "busy_percent": 85},
    }


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        print("gpu: no CUDA device here; nothing was measured", file=sys.stderr)
        return
    save("gpu", figures(measured()))
