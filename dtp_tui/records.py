"""Jobs and what happens to them as flat JSON records: a contract with scripts.

Names carry their unit; a field that nobody knows is null; secrets never appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dtp_engine.jobs import Attempt, Event, JobSpec
from dtp_engine.views import JobView
from dtp_trainer import wire
from dtp_tui import labels

HIDDEN = "•••"
_SENSITIVE = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY($|_)|APIKEY", re.IGNORECASE)


def job_record(view: JobView) -> dict[str, Any]:
    """One line of `dtp ps --json`."""
    job, gang = view.job, view.gang
    return {
        "id": job.id,
        "name": job.name,
        "state": job.state,
        "intent": job.intent,
        "doing": labels.headline(job, gang).word,
        "reason": job.reason,
        "detail": job.detail,
        "workers": job.workers,
        "workers_present": len(gang.members) if gang and job.active else 0,
        "nodes": str(job.spec.nodes),
        "attempt": job.attempt,
        "created_at": job.created_at,
        "created_by": job.created_by,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "exit_code": job.exit_code,
        "tags": dict(job.spec.tags),
        **progress_record(gang),
        "checkpoint": None if view.checkpoint is None else checkpoint_record(view.checkpoint),
        "checkpoint_problem": view.checkpoint_problem or None,
    }


def progress_record(gang: wire.Gang | None) -> dict[str, Any]:
    """Where the gang is; all null before its first generation."""
    return {
        "generation": gang.generation if gang else None,
        "world_size": gang.world_size if gang else None,
        "step": gang.step if gang else None,
        "total_steps": gang.total_steps if gang else None,
        "epoch": gang.epoch if gang else None,
        "values": dict(gang.values) if gang else {},
        "samples_per_s": gang.samples_per_s if gang else None,
        "tokens_per_s": gang.tokens_per_s if gang else None,
        "data_wait": gang.data_wait if gang else None,
        "step_s": gang.step_s if gang else None,
        "phases": dict(gang.phases) if gang else {},
        "verdict": gang.verdict if gang else "",
        "verdict_why": gang.verdict_why if gang else "",
    }


def worker_records(gang: wire.Gang | None) -> list[dict[str, Any]]:
    return [
        {
            "worker": member.worker,
            "host": member.host,
            "leader": gang is not None and member.worker == gang.leader,
            "first_rank": member.first_rank,
            "ranks": member.nproc_per_node,
            "leaving": member.leaving,
            "cpu_percent": member.cpu_percent,
            "memory_bytes": member.memory_bytes,
            "gpu_percent": list(member.gpu_percent),
            "gpu_memory_bytes": list(member.gpu_memory_bytes),
        }
        for member in (gang.members if gang else ())
    ]


def attempt_record(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.number,
        "created_at": attempt.created_at,
        "running_at": attempt.running_at,
        "ended_at": attempt.ended_at,
        "outcome": attempt.outcome,
        "workers": [
            {
                "worker": placement.worker,
                "state": placement.state,
                "planned_at": placement.planned_at,
                "ended_at": placement.ended_at,
                "exit_code": placement.exit_code,
            }
            for placement in attempt.placements
        ],
    }


def checkpoint_record(entry: wire.CheckpointEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "step": entry.step,
        "generation": entry.generation,
        "attempt": entry.attempt,
        "world_size": entry.world_size,
        "at": utc(entry.at),
        "bytes": entry.bytes,
        "values": dict(entry.values),
        "pinned": entry.pinned,
        "verified": entry.verified,
        "seconds": entry.seconds,
    }


def event_record(event: Event) -> dict[str, Any]:
    return {
        "seq": event.seq,
        "at": event.at,
        "job": event.job_id,
        "attempt": event.attempt,
        "actor": event.actor,
        "name": event.name,
        "text": event.text,
    }


def window_record(attempt: int, window: wire.Window) -> dict[str, Any]:
    """About a second of training of the whole job, as its rank 0 saw it."""
    return {
        "at": utc(window.at),
        "attempt": attempt,
        "generation": window.generation,
        "world_size": window.world_size,
        "step": window.step,
        "steps": window.steps,
        "total_steps": window.total_steps,
        "epoch": window.epoch,
        "values": dict(window.values),
        "samples_per_s": window.samples_per_s,
        "tokens_per_s": window.tokens_per_s,
        "phases_s": {name: dict(spread) for name, spread in window.phases.items()},
    }


def text_record(attempt: int, worker: int, text: wire.Text) -> dict[str, Any]:
    return {
        "at": utc(text.at),
        "attempt": attempt,
        "worker": worker,
        "source": text.source,
        "stream": text.stream,
        "text": text.text,
    }


def spec_record(spec: JobSpec) -> dict[str, Any]:
    """As a job file would write it; values that look like credentials are hidden."""
    from dtp_engine.spec import as_fields  # noqa: PLC0415 - yaml costs 30 ms, `ps` needs none

    return {**as_fields(spec), **({"env": shown_env(spec.env)} if spec.env else {})}


def shown_env(env: Mapping[str, str]) -> dict[str, str]:
    """
    >>> shown_env({"HF_TOKEN": "hf_1", "LR": "0.1"})
    {'HF_TOKEN': '•••', 'LR': '0.1'}
    """
    return {name: HIDDEN if _SENSITIVE.search(name) else value for name, value in env.items()}


def utc(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)
