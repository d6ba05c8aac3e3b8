"""The right to drive: taken when it is free or its holder is gone, kept by renewal, given back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta

from dtp_engine.clock import Clock
from dtp_engine.driver import is_alive
from dtp_engine.errors import LeaseLost
from dtp_engine.ledger import Lease, Ledger

_log = logging.getLogger(__name__)

RENEWALS_PER_TTL = 4


class LeaseKeeper:
    """One candidate for the lease of one ledger.

    A lease is stale when its (token, beat) did not move for `ttl_s` of this process's own clock, so
    clocks need not agree; the lease of a dead process of this machine is stale at once.
    """

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock,
        holder: str,
        *,
        ttl_s: float,
        liveness: Callable[[str], bool | None] = is_alive,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._holder = holder
        self._ttl_s = ttl_s
        self._liveness = liveness
        self._mine: Lease | None = None
        self.renew_at = 0.0
        """On the clock's monotonic time; the past while the lease is not mine."""
        self._other: Lease | None = None
        self._other_moved_at = 0.0

    @property
    def held(self) -> Lease | None:
        """Mine, as far as this process knows; every commit checks it again."""
        return self._mine

    @property
    def others_drive(self) -> bool:
        """The lease belongs to another process that is known to live, and to renew it.

        Whether it renews is told by its own clock here, which only decides whether this candidate
        stays to watch; when to take over is judged by this process's clock alone.
        """
        if self._mine is not None or self._other is None:
            return False
        silent = self._clock.now() - self._other.at > timedelta(seconds=self._ttl_s)
        return not silent and self._liveness(self._other.holder) is True

    async def hold(self) -> Lease | None:
        """Renew the lease when that is due, or try to take it; None while another one drives."""
        if self._mine is not None and self._clock.monotonic() >= self.renew_at:
            await self._renew(self._mine)
        if self._mine is None:
            await self._take()
        return self._mine

    def lose(self) -> None:
        """A commit was refused: somebody else drives."""
        self._mine = None
        self.renew_at = 0.0

    async def release(self) -> None:
        if self._mine is not None:
            await self._ledger.release_lease(self._mine)
            self.lose()

    async def _renew(self, lease: Lease) -> None:
        try:
            self._keep(await self._ledger.renew_lease(lease))
        except LeaseLost:
            _log.warning("the lease was taken over; driving no longer")
            self.lose()

    async def _take(self) -> None:
        seen = await self._ledger.lease()
        if seen is not None and not self._is_stale(seen):
            return
        taken = await self._ledger.take_lease(self._holder, over=seen)
        if taken is not None:
            _log.info("driving with token %d", taken.token)
            self._other = None
            self._keep(taken)

    def _keep(self, lease: Lease) -> None:
        self._mine = lease
        self.renew_at = self._clock.monotonic() + self._ttl_s / RENEWALS_PER_TTL

    def _is_stale(self, seen: Lease) -> bool:
        now = self._clock.monotonic()
        before = self._other
        if before is None or (before.token, before.beat) != (seen.token, seen.beat):
            self._other_moved_at = now
        self._other = seen
        return self._liveness(seen.holder) is False or now - self._other_moved_at >= self._ttl_s
