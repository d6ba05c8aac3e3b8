"""``manifest.json`` of a checkpoint: what it holds, and the hashes by which damage is found.

Written last, into the checkpoint's own folder; it carries a hash of itself. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from dtp_trainer.checkpoints.heads import FOLDER
from dtp_trainer.storage import NotFound, Storage, StorageError, Unreadable
from dtp_trainer.wire import CheckpointEntry

FORMAT = 2
"""1 knew no tensors in pieces."""
FILE = "manifest.json"
_CHUNK_BYTES = 4 << 20


class DamagedCheckpoint(StorageError):
    """A checkpoint that is not what its writer wrote; the message says which file and how."""


class UnreadableCheckpoint(DamagedCheckpoint):
    """The medium does not give it, so nobody knows whether it is what its writer wrote."""


@dataclass(frozen=True, slots=True)
class Share:
    """The file of one rank."""

    file: str
    rank: int
    bytes: int
    sha256: str
    tensors: tuple[str, ...]
    own: Any
    """What only this rank had, as `tree.flatten` encodes it."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.file,
            "rank": self.rank,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "tensors": list(self.tensors),
            "own": self.own,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Share:
        return cls(
            file=data["name"],
            rank=data["rank"],
            bytes=data["bytes"],
            sha256=data["sha256"],
            tensors=tuple(data["tensors"]),
            own=data["own"],
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    name: str
    job: str
    attempt: int
    generation: int
    world_size: int
    step: int
    epoch: float
    at: float
    """Unix time."""
    values: Mapping[str, float]
    data: Mapping[str, Any]
    """Where the data goes on."""
    torch: str
    """Version that wrote it."""
    state: Any
    """What all ranks shared, as `tree.flatten` encodes it."""
    shares: tuple[Share, ...]

    @property
    def bytes(self) -> int:
        return sum(share.bytes for share in self.shares)

    def entry(self, *, verified: bool | None = None) -> CheckpointEntry:
        """As it stands in the head."""
        return CheckpointEntry(
            name=self.name,
            step=self.step,
            generation=self.generation,
            attempt=self.attempt,
            world_size=self.world_size,
            at=self.at,
            bytes=self.bytes,
            values=self.values,
            verified=verified,
        )


_FIELDS = (
    "name",
    "job",
    "attempt",
    "generation",
    "world_size",
    "step",
    "epoch",
    "at",
    "values",
    "data",
    "torch",
    "state",
)


def key_of(name: str, file: str = FILE) -> str:
    """The key of a file of a checkpoint."""
    return f"{FOLDER}/{name}/{file}"


def share_file(rank: int, world_size: int) -> str:
    """
    >>> share_file(0, 2)
    'rank-00000-of-00002.safetensors'
    """
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def encode(manifest: Manifest) -> bytes:
    content = {"format": FORMAT, **{name: getattr(manifest, name) for name in _FIELDS}}
    content["files"] = [share.to_dict() for share in manifest.shares]
    return (json.dumps({"sha256": _self_hash(content), **content}) + "\n").encode()


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Raises `DamagedCheckpoint` when it is missing, cut short or changed."""
    try:
        content = json.loads(storage.read(key_of(name)))
        stated = content.pop("sha256")
        if content["format"] > FORMAT:
            raise StorageError(
                f"checkpoint {name} has format {content['format']}, this dtp reads {FORMAT}: "
                "use the version that wrote it, or a newer one"
            )
        shares = tuple(Share.from_dict(share) for share in content["files"])
        manifest = Manifest(**{field: content[field] for field in _FIELDS}, shares=shares)
    except (NotFound, Unreadable) as error:
        raise not_given(name, FILE, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{name}/{FILE} is not a manifest") from None
    found = _self_hash(content)
    if found != stated or manifest.name != name:
        raise DamagedCheckpoint(_difference(name, FILE, str(stated), found))
    return manifest


def check_share(name: str, share: Share, size: int, sha256: str) -> None:
    """Raises `DamagedCheckpoint` when a file is not what the manifest says."""
    if size != share.bytes:
        raise DamagedCheckpoint(
            f"{name}/{share.file} has {size} bytes, its manifest says {share.bytes}"
        )
    if sha256 != share.sha256:
        raise DamagedCheckpoint(_difference(name, share.file, share.sha256, sha256))


def verify(storage: Storage, name: str, *, between: Callable[[], None] | None = None) -> Manifest:
    """Read a checkpoint back and compare every hash. Raises `DamagedCheckpoint`.

    `between` is called every few megabytes; what it raises ends the reading.
    """
    manifest = read_manifest(storage, name)
    for share in manifest.shares:
        try:
            with storage.open(key_of(name, share.file)) as file:
                size, sha256 = hash_of(file, between=between)
        except (NotFound, Unreadable) as error:
            raise not_given(name, share.file, error) from None
        check_share(name, share, size, sha256)
    return manifest


def hash_of(file: IO[bytes], *, between: Callable[[], None] | None = None) -> tuple[int, str]:
    """Bytes and sha256 of whatever is left in `file`."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        if between:
            between()
    return size, digest.hexdigest()


def not_given(name: str, file: str, error: NotFound | Unreadable) -> DamagedCheckpoint:
    """A file that is missing is damage; one that is refused may come another time."""
    kind = UnreadableCheckpoint if isinstance(error, Unreadable) else DamagedCheckpoint
    return kind(f"{name}/{file} cannot be read: {error}")


def _self_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _difference(name: str, file: str, expected: str, found: str) -> str:
    return f"{name}/{file} has sha256 {found[:12]}…, its manifest says {expected[:12]}…"
