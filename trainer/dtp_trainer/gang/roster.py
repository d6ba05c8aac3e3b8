"""Who is there, who takes part in a generation and which ranks each of them runs. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """A connected worker."""

    worker: int
    host: str
    nproc: int
    joined_at: float
    leaving: bool = False
    unfit: str = ""

    @property
    def staying(self) -> bool:
        """It can take part in the next generation."""
        return not self.leaving and not self.unfit


@dataclasses.dataclass(frozen=True, slots=True)
class Seat:
    """A worker's part in a generation."""

    worker: int
    host: str
    nproc: int
    first_rank: int
    group_rank: int

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.nproc)


def staying(peers: Mapping[int, Peer]) -> tuple[Peer, ...]:
    return tuple(peer for _, peer in sorted(peers.items()) if peer.staying)


def seating(peers: Iterable[Peer], *, at_most: int) -> tuple[Seat, ...]:
    """Ranks in the order of worker numbers, so those that stay keep theirs when others join."""
    seats: list[Seat] = []
    first_rank = 0
    for peer in sorted(peers, key=lambda peer: peer.worker)[:at_most]:
        seats.append(Seat(peer.worker, peer.host, peer.nproc, first_rank, len(seats)))
        first_rank += peer.nproc
    return tuple(seats)


def world_size(seats: Iterable[Seat]) -> int:
    return sum(seat.nproc for seat in seats)


def worker_of(seats: Iterable[Seat], rank: int) -> int | None:
    return next((seat.worker for seat in seats if rank in seat.ranks), None)
