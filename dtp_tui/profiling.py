"""The life of one `dtp profile`: ask, wait for the ranks, copy what they recorded, show the top."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from dtp_engine import inspection
from dtp_engine.engine import Engine
from dtp_engine.errors import InfrastructureError, Refused, UsageError
from dtp_engine.jobs import Job, JobState
from dtp_engine.quantities import parse_duration
from dtp_engine.views import JobView
from dtp_trainer.inspection import Ask, Operator, Profiled
from dtp_trainer.storage import Storage
from dtp_tui import labels
from dtp_tui.output import Output, note
from dtp_tui.tables import Column

T = TypeVar("T")

POLL_S = 0.3
SHOWN = 10
PERFETTO = "https://ui.perfetto.dev"
MEMORY_VIEWER = "https://docs.pytorch.org/memory_viz"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    steps: int
    ranks: tuple[int, ...]
    """Empty: all."""
    memory: bool
    wait_s: float
    out: Path | None

    @classmethod
    def of(cls, *, steps: int, ranks: str, memory: bool, wait: str, out: Path | None) -> Self:
        """Raises `UsageError`."""
        try:
            wait_s = parse_duration(wait).total_seconds()
        except ValueError as error:
            raise UsageError(f"--wait: {error}") from None
        return cls(steps, _ranks(ranks), memory, wait_s, out)


def _ranks(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if parts == ["all"]:
        return ()
    if not all(part.isdigit() for part in parts):
        raise UsageError(f'--rank: expected numbers such as 0 or 0,3, or all, found "{text}"')
    return tuple(sorted({int(part) for part in parts}))


class Recording:
    """One profile of one job."""

    def __init__(self, engine: Engine, job: Job, wanted: Wanted, out: Output) -> None:
        self._engine, self._job, self._wanted, self._out = engine, job, wanted, out

    async def whole(self) -> None:
        """Raises `Refused` with what is in the way."""
        ranks = self._ranks_of(await self._engine.job(self._job.id))
        ask = Ask(
            id=secrets.token_hex(6),
            by=self._engine.settings.actor,
            until=time.time() + self._wanted.wait_s,
            steps=self._wanted.steps,
            ranks=self._wanted.ranks,
            memory=self._wanted.memory,
        )
        await self._in_storage(lambda storage: inspection.wish(storage, ask, time.time()))
        try:
            answers = await self._answers(ask, ranks)
        finally:
            await self._in_storage(lambda storage: inspection.withdraw(storage, ask, ranks))
        self._show(answers, await self._copied(answers))

    def _ranks_of(self, view: JobView) -> tuple[int, ...]:
        job, gang, wanted = view.job, view.gang, self._wanted
        if job.state is not JobState.RUNNING or gang is None:
            raise Refused(f"{job.name} is {job.state}; only a running job can be profiled")
        if gang.step is None:
            raise Refused(
                f"{job.name} has reported no step yet; only a script that uses Session, and has "
                "taken its first step, can be profiled"
            )
        if wanted.ranks and wanted.ranks[-1] >= gang.world_size:
            last = gang.world_size - 1
            there = f"has ranks 0 to {last}" if last else "has rank 0 alone"
            raise Refused(f"{job.name} {there}; --rank {wanted.ranks[-1]} is none of them")
        return wanted.ranks or tuple(range(gang.world_size))

    async def _answers(self, ask: Ask, ranks: Sequence[int]) -> list[Profiled]:
        whose = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
        steps = labels.plural(ask.steps, "step")
        note(f"dtp: recording {steps} of {whose} of {self._job.name} …")
        answers: dict[int, Profiled] = {}
        while missing := [rank for rank in ranks if rank not in answers]:
            await asyncio.sleep(POLL_S)
            await self._check_still_worth_it(ask, missing)
            for rank in missing:
                if (found := await self._answer(ask, rank)) is not None:
                    answers[rank] = found
        return [answers[rank] for rank in ranks]

    async def _answer(self, ask: Ask, rank: int) -> Profiled | None:
        found = await self._in_storage(lambda storage: inspection.answer(storage, ask, rank))
        if found is not None and found.error:
            raise InfrastructureError(f"rank {rank} could not be recorded: {found.error}")
        return found

    async def _check_still_worth_it(self, ask: Ask, missing: Sequence[int]) -> None:
        name = self._job.name
        if time.time() > ask.until:
            waited = labels.duration(self._wanted.wait_s)
            raise Refused(
                f"rank {missing[0]} of {name} did not end {labels.plural(ask.steps, 'step')} within"
                f" {waited}; ask for fewer, wait longer (--wait), or see: dtp show {name}"
            )
        view = await self._engine.job(self._job.id)
        if not view.job.active:
            raise Refused(f"{name} is {view.job.state} before the steps were recorded")

    async def _copied(self, answers: Sequence[Profiled]) -> list[Path]:
        keys = [key for answer in answers for key in answer.files]
        places = self._places(keys)
        for key, path in zip(keys, places, strict=True):
            data = await self._in_storage(partial(inspection.recorded, key=key))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except OSError as error:
                raise UsageError(f"cannot write {path}: {error.strerror}") from error
        return places

    def _places(self, keys: Sequence[str]) -> list[Path]:
        out = self._wanted.out
        if out is not None and len(keys) == 1 and not out.is_dir():
            return [out]
        folder = out or Path()
        return [folder / f"{self._job.name}-{key.rpartition('/')[2]}" for key in keys]

    def _show(self, answers: Sequence[Profiled], paths: Sequence[Path]) -> None:
        if self._out.json_lines:
            files = iter(paths)
            for answer in answers:
                own = [str(next(files)) for _ in answer.files]
                self._out.emit(_record(answer, own))
            return
        first = answers[0]
        steps = f"steps {first.first_step} to {first.last_step}"
        self._out.say(f"{self._job.name}, rank {first.rank}, {steps}: the most expensive operators")
        self._out.table(*_table(first, memory=self._wanted.memory))
        for path in paths:
            self._out.say(f"wrote {path}, {labels.size(path.stat().st_size)}")
        note(f"dtp: open a trace in {PERFETTO}")
        if any(path.name.endswith(".pickle") for path in paths):
            note(f"dtp: open a memory history in {MEMORY_VIEWER}")

    async def _in_storage(self, call: Callable[[Storage], T]) -> T:
        return await self._engine.storages.of(self._job.id, call)


def _record(answer: Profiled, files: Sequence[str]) -> dict[str, object]:
    return {
        "event": "profile",
        "rank": answer.rank,
        "first_step": answer.first_step,
        "last_step": answer.last_step,
        "files": list(files),
        "operators": [operator.to_dict() for operator in answer.operators],
    }


def _table(answer: Profiled, *, memory: bool) -> tuple[list[Column], list[tuple[str, ...]]]:
    steps = answer.last_step - answer.first_step + 1
    on_gpu = any(operator.gpu_ms for operator in answer.operators)
    columns = [
        Column("OPERATOR"),
        Column("CALLS/STEP", right=True),
        *([Column("GPU/STEP", right=True)] if on_gpu else []),
        Column("OWN/STEP", right=True),
        Column("ALL/STEP", right=True, drop=1),
        *([Column("MEMORY", right=True)] if memory else []),
    ]
    return columns, [
        _row(operator, steps, on_gpu=on_gpu, memory=memory) for operator in answer.operators[:SHOWN]
    ]


def _row(operator: Operator, steps: int, *, on_gpu: bool, memory: bool) -> tuple[str, ...]:
    return (
        operator.name,
        f"{operator.calls / steps:.3g}",
        *([_ms(operator.gpu_ms / steps)] if on_gpu else []),
        _ms(operator.own_ms / steps),
        _ms(operator.total_ms / steps),
        *([labels.size(max(operator.own_bytes, 0))] if memory else []),
    )


def _ms(milliseconds: float) -> str:
    """
    >>> _ms(0.01234), _ms(123.4)
    ('0.0123 ms', '123 ms')
    """
    return f"{milliseconds:.3g} ms"
