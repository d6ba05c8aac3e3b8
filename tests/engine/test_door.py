"""Blocking calls on a thread of their own: in order, with a deadline, never in the way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from functools import partial

import pytest

from dtp_engine.door import DeadlinePassed, Door


async def test_calls_run_one_after_the_other() -> None:
    """Calls made at once run in their order, on one thread that is not the loop's."""
    door, order = Door("d", deadline_s=10), list[tuple[int, int]]()

    def note(number: int) -> None:
        order.append((number, threading.get_ident()))

    await asyncio.gather(*(door.run(partial(note, number)) for number in range(20)))
    assert [n for n, _ in order] == list(range(20))
    assert {thread for _, thread in order}.isdisjoint({threading.get_ident()})
    assert len({thread for _, thread in order}) == 1
    door.close()


async def test_result_and_error_come_back() -> None:
    """What the function returns or raises is what the caller gets, a TimeoutError included."""
    door = Door("d", deadline_s=10)
    assert await door.run(lambda: 7) == 7

    def slow() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await door.run(slow)
    door.close()


async def test_deadline_frees_the_caller() -> None:
    """A call that hangs is given up; one that waited behind it never begins."""
    door, hang, begun = Door("d", deadline_s=0.05), threading.Event(), threading.Event()
    stuck, behind = door.run(hang.wait), door.run(begun.set)
    answers = await asyncio.gather(stuck, behind, return_exceptions=True)
    assert [type(answer) for answer in answers] == [DeadlinePassed] * 2
    hang.set()
    assert await door.run(begun.is_set) is False
    door.close()


async def test_cancelled_call_that_waited_never_begins() -> None:
    """A caller that goes away withdraws a call that has not begun."""
    door, hang, begun = Door("d", deadline_s=10), threading.Event(), threading.Event()
    first = asyncio.create_task(door.run(hang.wait))
    second = asyncio.create_task(door.run(begun.set))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    hang.set()
    await first
    assert await door.run(begun.is_set) is False
    door.close()


def test_process_does_not_wait_for_a_hanging_call() -> None:
    """A process whose call hangs can still end."""
    program = """
import asyncio, time
from dtp_engine.door import DeadlinePassed, Door
async def main():
    try:
        await Door("d", deadline_s=0.01).run(lambda: time.sleep(1000))
    except DeadlinePassed:
        print("over")
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("over\n", "")
