"""The files beside a launch file that say who this worker is and how it ended."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import psutil

from dtp_trainer.wire import CLAIM_FILE, EXIT_FILE, Exit, ProcessRecord, encode_object


def take_claim(folder: Path) -> bool:
    """Make this process the worker of `folder`; False when another one is, or was, or none may be.

    Raises:
        OSError: the folder cannot be written.
    """
    record = ProcessRecord(os.getpid(), psutil.Process().create_time())
    draft = _draft(folder / CLAIM_FILE, encode_object(record))
    try:
        # Not made in place: its content appears with its name.
        os.link(draft, folder / CLAIM_FILE)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def is_gone(folder: Path) -> bool:
    """Somebody removed the claim; a disk that does not answer is no such sign."""
    try:
        (folder / CLAIM_FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def write_exit(folder: Path, ended: Exit) -> None:
    """Raises `OSError`."""
    _draft(folder / EXIT_FILE, encode_object(ended)).replace(folder / EXIT_FILE)


def _draft(path: Path, data: bytes) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.touch(mode=0o600)
    draft.write_bytes(data)
    return draft
