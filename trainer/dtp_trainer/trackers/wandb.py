"""One W&B run over all attempts of a job."""

from __future__ import annotations

import contextlib
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dtp_trainer.checkpoints import heads
from dtp_trainer.storage import open_storage
from dtp_trainer.trackers.tracker import About, Row, Say
from dtp_trainer.trackers.turn import Standing
from dtp_trainer.wire import CheckpointEntry, Exit, ExitCode

CONNECT_S = 30
SYSTEM = "system"


class WeightsAndBiases:
    """Implements `Tracker`.

    The run has the job's id. Its own count of log calls (``_step``) is tenths of a second since the
    job began, which grows whatever the training does; curves are drawn over ``step``.
    """

    def __init__(self, about: About, say: Say, standing: Standing) -> None:
        self._about, self._say = about, say
        self._options = about.trackers["wandb"]
        self._best = about.checkpoint.get("keep_best")
        self._began = standing.began
        self._tenths = -1
        self._logged = standing.step
        self._skip_to = 0
        self._uploaded = ""
        self._run = self._open()

    def log(self, row: Row) -> None:
        """W&B cannot forget rows: what was logged of a step stays, and is not said again."""
        if row.step <= self._skip_to:
            return
        self._logged = max(self._logged, row.step)
        self._write(row.at, {"step": row.step, **row.values})

    def log_machines(self, row: Row) -> None:
        values = {f"{SYSTEM}/{name}": value for name, value in row.values.items()}
        self._write(row.at, {f"{SYSTEM}/seconds": row.step, **values})

    def go_back(self, step: int) -> None:
        self._skip_to = self._logged if step < self._logged else 0
        if self._skip_to:
            self._say(
                f"W&B: steps {step + 1} to {self._logged} are trained again; "
                "what was logged of them stays"
            )

    def checkpoint(self, name: str) -> None:
        wanted = self._options.get("artifacts", "never")
        if wanted == "never":
            return
        storage = open_storage(self._about.storage)
        entries = heads.read_head(storage).entries
        entry = next((entry for entry in entries if entry.name == name), None)
        best = heads.best_entry(entries, self._best)
        if wanted == "best":
            entry = best if best is not None and best.name != self._uploaded else None
        if entry is not None:
            self._upload(entry, is_best=best is not None and entry.name == best.name)

    def tick(self) -> None:
        """W&B sends by itself."""

    def close(self, ending: Exit | None) -> None:
        """A run that goes on later is `preempted` until then; another one ends as its job did."""
        import wandb  # noqa: PLC0415 - heavy

        code = ExitCode.PAUSED if ending is None else ending.code
        self._run.summary["job/outcome"] = ending.reason if ending else "goes on elsewhere"
        if code == ExitCode.PAUSED:
            self._run.mark_preempting()
        self._run.finish(exit_code=code)
        wandb.teardown()

    # ------------------------------------------------------------------------------------ inside

    def _write(self, at: float, values: Mapping[str, float]) -> None:
        if self._began is None:
            self._began = at
        self._tenths = max(self._tenths + 1, round((at - self._began) * 10))
        self._run.log(dict(values), step=self._tenths)

    def _open(self) -> Any:
        mode = os.environ.get("WANDB_MODE") or "online"
        why = "as WANDB_MODE says" if mode == "offline" else ""
        if mode == "online" and not _has_key():
            mode, why = "offline", "no WANDB_API_KEY"
        if mode != "online":
            return self._init(mode, why)
        try:
            run = self._init(mode, why)
        except Exception as error:  # noqa: BLE001 - a key that is wrong, a network that is not there
            first = (str(error).splitlines() or [type(error).__name__])[0]
            _forget()
            return self._init("offline", f"its server cannot be used: {first}")
        self._say(f"W&B: {run.url}")
        return run

    def _init(self, mode: str, why: str) -> Any:
        import wandb  # noqa: PLC0415 - heavy

        root = Path(self._about.folder or self._about.scratch)
        settings = wandb.Settings(**_settings(root))
        options = self._options
        run = wandb.init(
            id=self._about.job_id,
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            project=options.get("project") or os.environ.get("WANDB_PROJECT") or "uncategorized",
            entity=options.get("entity"),
            name=options.get("name") or self._about.job_name,
            group=options.get("group"),
            tags=options.get("tags"),
            config=dict(self._about.config),
            settings=settings,
        )
        run.define_metric("step", hidden=True)
        run.define_metric(f"{SYSTEM}/seconds", hidden=True)
        run.define_metric("*", step_metric="step")
        run.define_metric(f"{SYSTEM}/*", step_metric=f"{SYSTEM}/seconds")
        if mode == "offline":
            folders = root / "wandb" / f"offline-run-*-{self._about.job_id}"
            self._say(f"W&B: offline ({why}); upload it later: wandb sync {folders}")
        return run

    def _upload(self, entry: CheckpointEntry, *, is_best: bool) -> None:
        """Where nothing is sent, only where it lies and what it is; the bytes stay there."""
        import wandb  # noqa: PLC0415 - heavy

        about = {"step": entry.step, "bytes": entry.bytes, **entry.values}
        name = f"{self._about.job_name}-checkpoint"
        artifact = wandb.Artifact(name, type="model", metadata=about)
        folder = f"{self._about.storage.rstrip('/')}/checkpoints/{entry.name}"
        if self._run.offline or self._about.folder is None:
            artifact.add_reference(folder, checksum=False)
        else:
            path = Path(self._about.folder, "checkpoints", entry.name)
            artifact.add_dir(str(path), skip_cache=True)
        aliases = [f"step-{entry.step}", "latest", *(["best"] if is_best else [])]
        self._run.log_artifact(artifact, aliases=aliases)
        self._uploaded = entry.name


def environment(scratch: Path) -> dict[str, str]:
    """So that nothing of it lies in a home or a working folder; what the user set stays."""
    own = {name: str(scratch / "wandb" / name.lower()) for name in _FOLDERS}
    return {"WANDB_SILENT": "true", **own}


_FOLDERS = ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")


def _settings(root: Path) -> dict[str, Any]:
    """The process that logs is not the one that trains: what W&B would find out of it is wrong."""
    root.mkdir(parents=True, exist_ok=True)
    return {
        "root_dir": str(root),
        "silent": True,
        "console": "off",
        "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT") or CONNECT_S),
        "symlink": False,
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "x_disable_stats": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
    }


def _forget() -> None:
    """W&B's own process goes on with a run that could not be begun, and keeps its id in use."""
    import wandb  # noqa: PLC0415 - heavy

    wandb.teardown()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host or "") is not None
    return False
