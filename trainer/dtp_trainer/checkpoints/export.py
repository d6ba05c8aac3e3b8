"""The weights of a checkpoint as one safetensors file that any library reads. Free of torch.

Bytes are copied as they are, so every dtype is exact, and every file that is read is hashed on the
way: what does not fit its manifest is not exported.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dtp_trainer.checkpoints.contents import Held, Tensor
from dtp_trainer.checkpoints.manifest import Manifest, Share, check_share, key_of, not_given
from dtp_trainer.storage import NotFound, Storage, StorageError, Unreadable

_CHUNK_BYTES = 4 << 20


def export(
    storage: Storage,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    target: Path,
    *,
    between: Callable[[], None] | None = None,
) -> int:
    """Write `tensors` by these names; bytes of the file, which appears whole or not at all.

    A file of that name is replaced. `between` is called every few megabytes; what it raises ends
    the export.

    Raises:
        DamagedCheckpoint: a file of the checkpoint is not what its manifest says.
        StorageError: the target cannot be written.
    """
    header, places = _laid_out(tensors, metadata)
    size = len(header) + sum(tensor.bytes for tensor in tensors.values())
    wanted = {held.share.file: held.share for held, _ in places}
    with _appearing(target) as file:
        os.pwrite(file.fileno(), header, 0)
        os.truncate(file.fileno(), size)
        for share in wanted.values():
            mine = [(held, at) for held, at in places if held.share.file == share.file]
            _copy(storage, manifest.name, share, mine, file.fileno(), between)
    return size


def _laid_out(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[tuple[Held, int]]]:
    """The header, and of each part where its bytes go in the file. Larger elements come first, so
    that all of them are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    order = sorted(tensors, key=lambda name: (-_element_bytes(tensors[name]), name))
    starts: dict[str, int] = {}
    at = 0
    for name in order:
        tensor = tensors[name]
        starts[name] = at
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.bytes],
        }
        at += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    places = [
        (part.held, base + starts[name] + part.at)
        for name, tensor in tensors.items()
        for part in tensor.parts
    ]
    return len(text).to_bytes(8, "little") + text, places


def _element_bytes(tensor: Tensor) -> int:
    return tensor.bytes // tensor.count if tensor.count else 1


def _copy(
    storage: Storage,
    name: str,
    share: Share,
    places: Sequence[tuple[Held, int]],
    target: int,
    between: Callable[[], None] | None,
) -> None:
    """One pass over a share: hash all of it, write what is wanted of it where it belongs."""
    digest, at = hashlib.sha256(), 0
    left = sorted(places, key=lambda place: place[0].start)
    try:
        with storage.open(key_of(name, share.file)) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                end = at + len(chunk)
                for held, start in left:
                    if held.start >= end:
                        break
                    first, last = max(held.start, at), min(held.stop, end)
                    os.pwrite(target, chunk[first - at : last - at], start + first - held.start)
                at, left = end, [place for place in left if place[0].stop > end]
                if between:
                    between()
    except (NotFound, Unreadable) as error:
        raise not_given(name, share.file, error) from None
    check_share(name, share, at, digest.hexdigest())


@contextmanager
def _appearing(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends without an error."""
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("xb") as file:
            yield file
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
