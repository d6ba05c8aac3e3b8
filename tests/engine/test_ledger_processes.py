"""One ledger file, many processes: nothing acknowledged is lost, whoever writes or dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from dtp_engine.local.ledger import LocalLedger

PRELUDE = """
import asyncio, sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from dtp_engine.errors import LeaseLost
from dtp_engine.jobs import *
from dtp_engine.ledger import Change
from dtp_engine.local.ledger import LocalLedger
NOW = datetime(2026, 1, 1, tzinfo=UTC)
def job_of(id):
    return Job(id, id, JobSpec(id, "python a.py"), JobState.QUEUED, Intent.RUN, 1, NOW, "me")
def submit_of(id):
    return Request("key-" + id, RequestKind.SUBMIT, id, "me", NOW)
def event_of(id, name):
    return Event(0, NOW, id, 1, "controller", name, "")
"""


def start(body: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


CONTENDER = """
async def main(path, me):
    ledger = await LocalLedger.open(path)
    for number in range(15):
        await ledger.request(submit_of(f"shared{number}"), job=job_of(f"shared{number}"))
        await ledger.request(submit_of(f"{me}-{number}"), job=job_of(f"{me}-{number}"))
    commits = 0
    while commits < 10:
        held = await ledger.lease()
        lease = await ledger.take_lease(me, over=held)
        if lease is None:
            continue
        try:
            for _ in range(2):
                job = await ledger.job("shared0")
                await ledger.commit(lease, Change(job, events=(event_of("shared0", me),)))
                commits += 1
        except LeaseLost:
            pass
    print(commits)
asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


async def test_eight_processes_at_once(tmp_path: Path) -> None:
    """Eight processes that create, submit to, drive and depose each other at once keep every
    acknowledged write, each exactly once."""
    path = tmp_path / "ledger.db"
    contenders = [start(CONTENDER, str(path), f"p{number}") for number in range(8)]
    answers = [contender.communicate(timeout=100) for contender in contenders]
    assert [error for _, error in answers] == [""] * 8
    ledger = await LocalLedger.open(path)
    shared = await ledger.job("shared0")
    events = await ledger.events()
    assert shared is not None
    assert shared.version == len(events) == sum(int(out) for out, _ in answers)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert len(await ledger.jobs()) == len(await ledger.pending()) == 15 + 8 * 15
    await ledger.aclose()


COMMITTER = """
async def main(path):
    ledger = await LocalLedger.open(path)
    lease = await ledger.take_lease("me", over=await ledger.lease())
    await ledger.request(submit_of("j"), job=job_of("j"))
    job = await ledger.job("j")
    while True:
        events = (event_of("j", "one"), event_of("j", "two"))
        attempt = Attempt("j", job.version, NOW, "s")
        job = await ledger.commit(lease, Change(job, (attempt,), events))
        print(job.version, flush=True)
asyncio.run(main(Path(sys.argv[1])))
"""


async def test_kill_in_the_middle_of_commits(tmp_path: Path) -> None:
    """A process killed with -9 among its commits loses none that was acknowledged, and no commit
    is there in part."""
    path = tmp_path / "ledger.db"
    acknowledged = 0
    for wanted in (1, 7, 40, 111):
        with start(COMMITTER, str(path)) as committer:
            assert committer.stdout is not None
            for _ in range(wanted):
                acknowledged = int(committer.stdout.readline())
            committer.send_signal(signal.SIGKILL)
            unread = committer.stdout.read().split()
            acknowledged = int(unread[-1]) if unread else acknowledged
        ledger = await LocalLedger.open(path)
        job = await ledger.job("j")
        assert job is not None
        assert acknowledged <= job.version <= acknowledged + 1
        assert len(await ledger.attempts(["j"])) == job.version
        assert len(await ledger.events(limit=10_000)) == 2 * job.version
        await ledger.aclose()
