"""Values of a job's secrets: taken once from the submitter's environment, kept in one private file
beside the job's objects; never in the ledger, an event or a printed spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dtp_engine.errors import InfrastructureError, UsageError
from dtp_engine.jobs import JobSpec
from dtp_engine.local.folders import read_json, write_json

FILE = "secrets.json"


def store_secrets(home: Path, job_id: str, spec: JobSpec, environ: Mapping[str, str]) -> None:
    """Call before the job is submitted. Raises `UsageError` naming what is not set, and
    `InfrastructureError` when the file cannot be written."""
    missing = [name for name in spec.secrets if name not in environ]
    if missing:
        names = ", ".join(missing)
        raise UsageError(f"secrets not set in your environment: {names}; export them and try again")
    if not spec.secrets:
        return
    path = _path(home, job_id)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, {name: environ[name] for name in spec.secrets})
    except OSError as error:
        raise InfrastructureError(f"cannot keep secrets in {path}: {error.strerror}") from error


def read_secrets(home: Path, job_id: str, spec: JobSpec) -> dict[str, str]:
    """Raises `InfrastructureError` naming those that are not there."""
    if not spec.secrets:
        return {}
    stored = read_json(_path(home, job_id))
    missing = [name for name in spec.secrets if name not in stored]
    if missing:
        raise InfrastructureError(
            f"secrets of job {job_id} are missing: {', '.join(missing)}; submit it again"
        )
    return {name: str(stored[name]) for name in spec.secrets}


def _path(home: Path, job_id: str) -> Path:
    return home / "storage" / "jobs" / job_id / FILE
