"""What a rank finds in its environment, and that all ranks of a job are forked from one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dtp_trainer.gang.messages import Start
from dtp_trainer.ranks.zygote import PRELOAD
from dtp_trainer.ranks.zygote_client import warm_path
from dtp_trainer.worker.rank_env import job_env, rank_env
from tests.trainer.agents.test_election import launch


def test_one_warm_process_for_all_generations(tmp_path: Path) -> None:
    """Nothing that differs between ranks or generations names another process to fork from: that
    would cost each of them the imports again."""
    job = replace(launch(), workdir=str(tmp_path), scratch=str(tmp_path), nproc_per_node=2)
    inherited = {"PATH": "/usr/bin", "HOME": "/root"}
    paths = {warm_path(tmp_path, job_env(job, inherited), PRELOAD)}
    for generation in (1, 2):
        order = Start(generation, 4, 2, 1, 2, "127.0.0.1", 29500 + generation, generation)
        for local_rank in (0, 1):
            folder = tmp_path / f"g{generation}"
            steps, errors = folder / f"{local_rank}.jsonl", folder / f"{local_rank}.error.json"
            env = rank_env(
                job,
                order,
                local_rank,
                inherited=inherited,
                steps_file=steps,
                error_file=errors,
            )
            paths.add(warm_path(tmp_path, env, PRELOAD))
    assert len(paths) == 1
