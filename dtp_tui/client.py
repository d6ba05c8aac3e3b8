"""One command's way to the engine: settings, event loop, Ctrl-C."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import typer

from dtp_engine.engine import Engine
from dtp_engine.settings import load_settings
from dtp_tui.output import Exit

T = TypeVar("T")


def with_engine(action: Callable[[Engine], Awaitable[T]]) -> T:
    """Open the engine, do one thing, close it. Ctrl-C leaves at once with 130."""

    async def opened() -> T:
        async with await Engine.open(load_settings()) as engine:
            return await action(engine)

    return run_to_end(opened())


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(Exit.DETACHED) from None
