"""The environment of a rank: torchrun's names, so that its scripts run, and ours. Pure."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from pathlib import Path

from dtp_trainer.gang.messages import Start
from dtp_trainer.wire import Env, Launch
from dtp_trainer.worker.evidence import recorder_env


def rank_env(
    launch: Launch,
    order: Start,
    local_rank: int,
    *,
    inherited: Mapping[str, str],
    steps_file: Path,
    error_file: Path,
) -> dict[str, str]:
    """All of it: ranks and addresses win over what the job sets, that over what was inherited."""
    job = job_env(launch, inherited)
    if _shares_machine(launch, order):
        job.setdefault("OMP_NUM_THREADS", "1")
    return {
        **recorder_env(steps_file.parent),
        **job,
        **_torchrun(launch, order, local_rank, error_file),
        **_ours(launch, order, steps_file),
        "PYTHONUNBUFFERED": "1",
    }


def job_env(launch: Launch, inherited: Mapping[str, str]) -> dict[str, str]:
    """What all ranks of the job share. A rank that crashes or hangs can say where it stands."""
    env = {"PYTHONFAULTHANDLER": "1", **inherited, **launch.env}
    env.pop(Env.LAUNCH, None)
    return env


def _torchrun(launch: Launch, order: Start, local_rank: int, error_file: Path) -> dict[str, str]:
    rank = order.first_rank + local_rank
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(order.world_size),
        "LOCAL_WORLD_SIZE": str(launch.nproc_per_node),
        "GROUP_RANK": str(order.group_rank),
        "GROUP_WORLD_SIZE": str(order.group_world_size),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(order.world_size),
        "MASTER_ADDR": order.master_addr,
        "MASTER_PORT": str(order.master_port),
        "TORCHELASTIC_RUN_ID": launch.job_id,
        "TORCHELASTIC_RESTART_COUNT": str(order.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(launch.error_budget),
        "TORCHELASTIC_ERROR_FILE": str(error_file),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def _ours(launch: Launch, order: Start, steps_file: Path) -> dict[str, str]:
    no_step_for = "" if launch.no_step_for_s is None else str(launch.no_step_for_s)
    return {
        Env.JOB_ID: launch.job_id,
        Env.JOB_NAME: launch.job_name,
        Env.ATTEMPT: str(launch.attempt),
        Env.GENERATION: str(order.generation),
        Env.WORKER: str(launch.worker),
        Env.STORAGE: launch.storage,
        Env.STEPS_FILE: str(steps_file),
        Env.ASK_FILE: str(ask_file(steps_file)),
        Env.CHECKPOINT: json.dumps(dict(launch.checkpoint)),
        Env.OPTIONS: json.dumps(dict(launch.options)),
        Env.DATA: json.dumps(dict(launch.data)),
        Env.NO_STEP_FOR: no_step_for,
    }


def ask_file(steps_file: Path) -> Path:
    """Where the agent leaves a wish for the rank with this step file."""
    return steps_file.with_suffix(".ask.json")


def _shares_machine(launch: Launch, order: Start) -> bool:
    return launch.nproc_per_node > 1 or (order.world_size > 1 and _is_loopback(launch.host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
