"""What clients ask of a running job's ranks, as its leader finds it in the job's storage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace

from dtp_trainer.gang.messages import Profile
from dtp_trainer.gang.progress import Progress
from dtp_trainer.gang.state import Noted, Phase, State
from dtp_trainer.inspection import WISH_KEY, Ask
from dtp_trainer.storage import Storage, StorageError

LOOK_EVERY_S = 2.0
"""One small read; on S3 it costs about two cents a day."""
AHEAD_S = 2.5
"""How long a wish may take to every rank; all begin with the first step after that."""


class Wishes:
    """Each wish is found once in each generation: what an older one began died with it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._looked_at = -LOOK_EVERY_S
        self._found: tuple[int, str] = (0, "")

    async def pass_on(
        self,
        state: State,
        tell: Callable[[Noted], None],
        send: Callable[[int, Profile], None],
    ) -> None:
        """What was not asked before, to the workers of the generation that runs.

        A script that took no step has nobody who would answer.
        """
        if state.phase is not Phase.RUNNING or state.progress.step is None:
            return
        ask = await self.newest(state.generation)
        if ask is None:
            return
        tell(Noted("profile", described(ask)))
        order = Profile(state.generation, timed(ask, state.progress))
        for seat in state.seats:
            send(seat.worker, order)

    async def newest(self, generation: int) -> Ask | None:
        """One that somebody still waits for and that was not found before."""
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return None
        self._looked_at = time.monotonic()
        ask = await asyncio.to_thread(self._read)
        if ask is None or ask.until < time.time() or self._found == (generation, ask.id):
            return None
        self._found = (generation, ask.id)
        return ask

    def _read(self) -> Ask | None:
        """Storage that fails is complained of by those that need it."""
        with contextlib.suppress(StorageError, ValueError, TypeError):
            ask: Ask = Ask.from_dict(json.loads(self._storage.read(WISH_KEY)))
            return ask
        return None


def timed(ask: Ask, progress: Progress) -> Ask:
    """The wish, to begin at one and the same step on all ranks."""
    phases = progress.window.phases if progress.window else {}
    seconds = phases.get("step", {}).get("median") or AHEAD_S
    return replace(ask, not_before=progress.newest + 2 + math.ceil(AHEAD_S / seconds))


def described(ask: Ask) -> str:
    """
    >>> described(Ask("x", "ana@laptop", 0.0, 5, (0, 3)))
    'ana@laptop asked for a profile of 5 steps of ranks 0, 3'
    """
    what = "memory profile" if ask.memory else "profile"
    steps = "1 step" if ask.steps == 1 else f"{ask.steps} steps"
    numbers = ", ".join(map(str, ask.ranks))
    whose = f"rank{'' if len(ask.ranks) == 1 else 's'} {numbers}" if ask.ranks else "all ranks"
    return f"{ask.by} asked for a {what} of {steps} of {whose}"
