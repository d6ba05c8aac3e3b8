"""One process at a time tracks a job: ``trackers.json`` in its storage says which. Blocking.

The newest leader's process takes the turn at once, and then waits until the one before has closed
its files: that looks every few seconds whether the turn is still its own.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from dtp_trainer.storage import Conflict, NotFound, Storage, StorageError

KEY = "trackers.json"
CHECK_S = 3.0
WAIT_S = 3 * CHECK_S
"""One that has not left by then is dead, or cut off and will write nothing that is kept."""
_POLL_S = 0.1
_TRIES = 20

Token: TypeAlias = tuple[int, int, int]


class Superseded(Exception):
    """A newer process tracks the job."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far the job was tracked when a turn was taken."""

    step: int = 0
    began: float | None = None


@dataclass(frozen=True, slots=True)
class _Book:
    holder: Token = (0, 0, 0)
    left: Token = (0, 0, 0)
    """The newest holder that has closed its files."""
    standing: Standing = Standing()


class Turn:
    def __init__(self, storage: Storage, token: Token, *, wait_s: float = WAIT_S) -> None:
        self._storage, self._token, self._wait_s = storage, token, wait_s

    def take(self) -> Standing:
        """Waits until the holder before has left, or for `wait_s`.

        Raises:
            Superseded: a newer process has the turn.
            StorageError: nobody can tell.
        """
        before = self._change(lambda book: replace(book, holder=self._token))
        deadline = time.monotonic() + self._wait_s
        book = before
        while book.left < before.holder and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            book = self._read()[0]
            if book.holder > self._token:
                raise Superseded
        return book.standing

    def keep(self, standing: Standing) -> None:
        """Say how far it is. Storage that refuses is no reason to stop.

        Raises:
            Superseded: a newer process has the turn.
        """
        with contextlib.suppress(StorageError):
            self._change(lambda book: replace(book, standing=standing))

    def leave(self, standing: Standing) -> None:
        """The files are closed. Raises `StorageError`."""

        def left(book: _Book) -> _Book:
            return replace(book, left=max(book.left, self._token), standing=standing)

        self._change(left, own=False)

    def _change(self, change: Callable[[_Book], _Book], *, own: bool = True) -> _Book:
        """The book as it was before. With `own`, only while no newer process has the turn."""
        for _ in range(_TRIES):
            book, tag = self._read()
            if own and book.holder > self._token:
                raise Superseded
            try:
                self._storage.write_if(KEY, _encode(change(book)), tag=tag)
            except Conflict:
                continue
            return book
        raise StorageError(f"{KEY} is changed by others again and again")

    def _read(self) -> tuple[_Book, str | None]:
        try:
            found = self._storage.read_tagged(KEY)
        except NotFound:
            return _Book(), None
        try:
            return _decode(found.data), found.tag
        except (ValueError, TypeError, KeyError):
            return _Book(), found.tag


def _encode(book: _Book) -> bytes:
    standing = {"step": book.standing.step, "began": book.standing.began}
    return json.dumps({"holder": book.holder, "left": book.left, **standing}).encode()


def _decode(data: bytes) -> _Book:
    """Raises `ValueError`, `TypeError`, `KeyError`."""
    found = json.loads(data)
    standing = Standing(int(found["step"]), found["began"])
    return _Book(_token(found["holder"]), _token(found["left"]), standing)


def _token(numbers: list[int]) -> Token:
    attempt, term, start = map(int, numbers)
    return attempt, term, start
