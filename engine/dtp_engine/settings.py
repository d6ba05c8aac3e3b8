"""Where dtp keeps its state and how it behaves on this machine: environment over config file over
defaults, one frozen object.

The config file is ``${XDG_CONFIG_HOME:-~/.config}/dtp/config.yaml``, with the names of `SETTINGS`.
"""

from __future__ import annotations

import difflib
import os
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtp_engine.errors import UsageError
from dtp_engine.quantities import parse_duration
from dtp_trainer.storage import StorageError, open_storage

if TYPE_CHECKING:
    from dtp_engine.yamltree import Entry


@dataclass(frozen=True, slots=True)
class Settings:
    home: Path
    """State: ledger, storage, worker folders, sockets. `DTP_HOME`."""
    actor: str
    """Who asks; written beside every request. `DTP_ACTOR`."""
    backend: str = "local"
    storage: str | None = None
    """URI below which jobs keep their checkpoints; None: in `home`. `DTP_STORAGE_ROOT`."""
    controller_idle_s: float = 300.0
    """The background controller leaves when nothing has been active for so long.
    `DTP_CONTROLLER_IDLE`."""
    zygote_idle_s: float = 300.0
    """A warm process leaves when no job has used it for so long. `DTP_ZYGOTE_IDLE`."""
    lease_ttl_s: float = 20.0
    """A lease that has not moved for so long, as seen by the reader's own clock, may be taken
    over. `DTP_LEASE_TTL`."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the config file, and its variable."""

    name: str
    field: str
    """Of `Settings`."""
    variable: str
    help: str
    parse: Callable[[str], Any]
    """Raises `ValueError`."""
    default: Callable[[Mapping[str, str]], str]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A setting with its value and where that came from."""

    setting: Setting
    text: str
    value: Any
    origin: str
    """``DTP_HOME``, ``/home/ana/.config/dtp/config.yaml:3`` or ``default``."""


def default_home(environ: Mapping[str, str] = os.environ) -> Path:
    state = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(environ.get("DTP_HOME") or Path(state) / "dtp")


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    folder = environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "dtp" / "config.yaml"


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _storage(text: str) -> str | None:
    if text == "home":
        return None
    try:
        return open_storage(text).uri
    except StorageError as error:
        raise ValueError(str(error)) from None


def _actor(text: str) -> str:
    if not text.isprintable() or len(text) > 100:
        raise ValueError("must be printable, at most 100 characters")
    return text


def _seconds(text: str) -> float:
    """A duration; a bare number is seconds."""
    plain = re.fullmatch(r"\d+(\.\d+)?", text)
    return float(text) if plain else parse_duration(text).total_seconds()


def _lease_seconds(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 1:
        raise ValueError("must be at least 1s, or a busy controller loses its lease")
    return seconds


def _default_actor(environ: Mapping[str, str]) -> str:
    try:
        user = environ.get("USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"uid{os.getuid()}"
    return f"{user}@{os.uname().nodename.partition('.')[0]}"


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "home",
        "home",
        "DTP_HOME",
        "Where all state is kept: ledger, job storage, logs.",
        _path,
        lambda environ: str(default_home(environ)),
    ),
    Setting(
        "actor",
        "actor",
        "DTP_ACTOR",
        "Who you are in a job's timeline.",
        _actor,
        _default_actor,
    ),
    Setting(
        "backend",
        "backend",
        "DTP_BACKEND",
        "What holds the workers; this version has: local.",
        str,
        lambda _: "local",
    ),
    Setting(
        "storage",
        "storage",
        "DTP_STORAGE_ROOT",
        "Where new jobs keep checkpoints: `home`, a folder, or s3://bucket/prefix.",
        _storage,
        lambda _: "home",
    ),
    Setting(
        "controller_idle",
        "controller_idle_s",
        "DTP_CONTROLLER_IDLE",
        "The background controller leaves when nothing has been active for so long.",
        _seconds,
        lambda _: "5m",
    ),
    Setting(
        "zygote_idle",
        "zygote_idle_s",
        "DTP_ZYGOTE_IDLE",
        "A warm Python process leaves when no job has used it for so long.",
        _seconds,
        lambda _: "5m",
    ),
    Setting(
        "lease_ttl",
        "lease_ttl_s",
        "DTP_LEASE_TTL",
        "A controller that has not been heard of for so long is replaced.",
        _lease_seconds,
        lambda _: "20s",
    ),
)


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Raises `UsageError` that names the variable, or the file and line."""
    return Settings(**{each.setting.field: each.value for each in resolve(environ)})


def resolve(environ: Mapping[str, str] = os.environ) -> tuple[Resolved, ...]:
    """Every setting, in the order of `SETTINGS`. An empty variable counts as not set."""
    entries = _read_config(config_path(environ))
    return tuple(_resolve(setting, entries.get(setting.name), environ) for setting in SETTINGS)


def _resolve(setting: Setting, entry: Entry | None, environ: Mapping[str, str]) -> Resolved:
    given = environ.get(setting.variable)
    if given:
        return _parsed(setting, given, setting.variable)
    if entry is not None:
        return _parsed(setting, _text_of(setting, entry), entry.value.where)
    return _parsed(setting, setting.default(environ), "default")


def _parsed(setting: Setting, text: str, origin: str) -> Resolved:
    try:
        return Resolved(setting, text, setting.parse(text), origin)
    except ValueError as error:
        raise UsageError(f"{origin}: {setting.name}: {error}") from None


def _text_of(setting: Setting, entry: Entry) -> str:
    from dtp_engine.yamltree import Scalar, kind_of  # noqa: PLC0415 - only with a config file

    if not isinstance(entry.value, Scalar) or not entry.value.text.strip():
        found = kind_of(entry.value)
        raise UsageError(f"{entry.value.where}: {setting.name}: expected one value, found {found}")
    return entry.value.text.strip()


def _read_config(path: Path) -> Mapping[str, Entry]:
    """Empty when there is no such file, or nothing in it."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if not re.search(rb"^\s*[^#\s]", raw, re.MULTILINE):
        return {}
    from dtp_engine.yamltree import parse_table  # noqa: PLC0415 - yaml costs 30 ms

    entries = parse_table(raw, str(path)).entries
    for entry in entries:
        _refuse_unknown(entry)
    return {entry.key: entry for entry in entries}


def _refuse_unknown(entry: Entry) -> None:
    names = [setting.name for setting in SETTINGS]
    if entry.key in names:
        return
    near = difflib.get_close_matches(entry.key, names, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"settings: {', '.join(names)}"
    raise UsageError(f"{entry.where}: {entry.key}: unknown setting; {hint}")
