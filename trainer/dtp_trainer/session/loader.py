"""Batches of a dataset in a given order, fetched by a thread of this process a little ahead.

Worker processes lose to this for anything but heavy decoding: every batch would be pickled through
a pipe, and a killed rank would leave them behind.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeAlias

from torch.utils.data import default_collate

from dtp_trainer.sampler import Indices

Collate: TypeAlias = Callable[[list[Any]], Any]


class Dataset(Protocol):
    """Samples by index. One that also has ``__getitems__(indices)`` is asked for a batch at once: a
    list that it returns is collated, anything else is the batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Loader:
    """An iterator of batches; `close` ends its thread, wherever the iteration stands."""

    def __init__(
        self,
        dataset: Dataset,
        order: Iterable[Indices],
        *,
        collate: Collate | None = None,
        ahead: int = 2,
        send: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        """`order` gives the indices of each batch, and `send` is the last that the thread does with
        it; with `ahead` = 0 no thread is started."""
        self._dataset, self._send = dataset, send
        self._collate = collate or default_collate
        self._batches = map(self._fetch, order)
        self._closed = threading.Event()
        self._ready: queue.Queue[_Fetched] = queue.Queue(maxsize=max(ahead, 1))
        self._thread: threading.Thread | None = None
        if ahead > 0:
            self._thread = threading.Thread(target=self._run, name="dtp-loader", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # a thread inside torch must not outlive the interpreter

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._thread is None:
            return next(self._batches)
        batch, error = self._ready.get()
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        self._closed.set()
        atexit.unregister(self.close)
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._drain()
            self._thread.join(0.01)

    def _run(self) -> None:
        while not self._closed.is_set():
            fetched = self._next()
            self._ready.put(fetched)
            if fetched[1] is not None:
                return

    def _next(self) -> _Fetched:
        try:
            return next(self._batches), None
        except BaseException as error:  # noqa: BLE001 - raised again where the batch is asked for
            return None, error

    def _drain(self) -> None:
        while not self._ready.empty():
            self._ready.get_nowait()

    def _fetch(self, indices: Indices) -> Any:
        return self._send(self._batch(indices))

    def _batch(self, indices: Indices) -> Any:
        batched = getattr(self._dataset, "__getitems__", None)
        if batched is None:
            return self._collate([self._dataset[index] for index in indices.tolist()])
        found = batched(indices.tolist())
        return self._collate(found) if isinstance(found, list) else found


_Fetched: TypeAlias = tuple[Any, BaseException | None]
