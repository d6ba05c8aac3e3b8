"""What to do with an exception that nobody foresaw: keep the traceback, say one line."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from dtp_engine.settings import default_home
from dtp_tui import __version__


def report(error: BaseException, words: Sequence[str]) -> str:
    """Write the traceback to ``$DTP_HOME/logs``, or where temporary files go; the line to show."""
    summary = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    text = "".join(traceback.format_exception(error))
    now = datetime.now(UTC)
    body = f"{now.isoformat()} dtp {__version__} {' '.join(words)}\n{text}"
    name = f"crash-{now:%Y%m%dT%H%M%S%f}.log"
    for folder in (default_home() / "logs", Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(body, encoding="utf-8", errors="replace")
            return f"internal error: {summary}; the details are in {folder / name}"
    return f"internal error: {summary}"
