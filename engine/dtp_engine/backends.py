"""name → backend, ledger and storage, imported when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtp_engine.backend import Backend
from dtp_engine.errors import UsageError
from dtp_engine.jobs import JobSpec
from dtp_engine.ledger import Ledger
from dtp_engine.settings import Settings

LEDGER_FILE = "ledger.db"


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine or a controller stands on; the holder closes both."""

    ledger: Ledger
    backend: Backend


async def open_parts(settings: Settings) -> Parts:
    """Raises `UsageError` for a name that is none, `LedgerError` when the state cannot be
    opened."""
    if settings.backend != "local":
        raise UsageError(f'no backend "{settings.backend}"; this version has: local')
    from dtp_engine.local.backend import LocalBackend  # noqa: PLC0415 - only when asked for
    from dtp_engine.local.ledger import LocalLedger  # noqa: PLC0415

    ledger = await LocalLedger.open(settings.home / LEDGER_FILE)
    return Parts(ledger, LocalBackend(settings))


def keep_secrets(home: Path, job_id: str, spec: JobSpec, environ: Mapping[str, str]) -> None:
    """Store the values of the secrets that the spec names, for its workers alone. Blocking.

    Raises `UsageError` naming those that are not in `environ`.
    """
    if spec.secrets:
        from dtp_engine.local.secrets import store_secrets  # noqa: PLC0415 - seldom asked for

        store_secrets(home, job_id, spec, environ)


def job_storage_uri(home: Path, job_id: str, storage: str | None = None) -> str:
    """``jobs/<id>/`` in `storage`, or in the folder of this machine.

    A job that began in the folder stays there: elsewhere it would find no checkpoint.
    """
    here = home / "storage" / "jobs" / job_id
    return here.as_uri() if storage is None or here.is_dir() else f"{storage}/jobs/{job_id}"
