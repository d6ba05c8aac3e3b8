"""What is kept of a hang, what is made of it, and how a wish comes to the ranks."""

from __future__ import annotations

import asyncio
import json
import os
import select
import stat
import sys
import time
from pathlib import Path

import pytest

from dtp_trainer import wire
from dtp_trainer.gang import blame, progress
from dtp_trainer.gang.messages import RankExited
from dtp_trainer.gang.progress import Progress, Stall
from dtp_trainer.gang.wishes import Wishes, timed
from dtp_trainer.inspection import WISH_KEY, Ask
from dtp_trainer.storage import open_storage
from dtp_trainer.worker.evidence import Evidence, dump_in, recorder_env

DUMP = """\
step 3
Fatal Python error: Aborted

Current thread 0x00007f2 (most recent call first):
  File "/home/ana/train.py", line 12 in <module>

Extension modules: numpy (total: 1)
""".splitlines()


def stands(rank: int, where: str) -> RankExited:
    return RankExited(1, rank, -6, stands_in=where, waits=True)


def test_the_odd_rank_is_named() -> None:
    """The one that waits elsewhere than the rest; of two, the one that is further down."""
    two = [stands(0, "f (x.py:9)"), stands(1, "f (x.py:12)")]
    found = blame.apart(two)
    assert found is not None
    assert (found[0].rank, found[1]) == (1, "f (x.py:9)")
    three = [stands(0, "f (x.py:12)"), stands(1, "f (x.py:9)"), stands(2, "f (x.py:12)")]
    found = blame.apart(three)
    assert found is not None
    assert found[0].rank == 1
    text = progress.describe_parting(Stall(None, 4, 4, 9.0), *found)
    assert text.startswith("rank 1 waits in f (x.py:9), the others in f (x.py:12), since step 4")


def test_nobody_is_named_without_reason() -> None:
    """Not when all stand in one place, in many, or two against two."""
    assert blame.apart([stands(0, "f (x.py:9)"), stands(1, "f (x.py:9)")]) is None
    assert blame.apart([stands(n, f"f (x.py:{n})") for n in range(3)]) is None
    assert blame.apart([stands(n, f"f (x.py:{n % 2})") for n in range(4)]) is None
    assert blame.apart([]) is None


def test_a_dump_is_cut_out() -> None:
    """From the word that it begins to the list of modules, which tells nothing."""
    assert dump_in(DUMP).splitlines() == [
        "Current thread 0x00007f2 (most recent call first):",
        '  File "/home/ana/train.py", line 12 in <module>',
    ]
    assert dump_in(["no dump"]) == ""


async def test_what_a_rank_told_is_stored(tmp_path: Path) -> None:
    """Its dump and the record of NCCL, which its watching thread writes when the pipe is read."""
    folder = tmp_path / "steps"
    folder.mkdir()
    prefix = Path(recorder_env(folder)["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"])
    pipe = prefix.with_name(f"{prefix.name}2.pipe")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    evidence = Evidence(tmp_path.as_uri(), 7, folder)
    asking = asyncio.create_task(evidence.ask({2: [os.getpid()], 3: []}))
    await asyncio.to_thread(wait_for_a_byte, reader)
    prefix.with_name(f"{prefix.name}2").write_bytes(b"the record")
    await asking
    os.close(reader)
    evidence.keep(2, DUMP)
    evidence.keep(3, ["killed before it could say anything"])
    await evidence.kept()
    storage = open_storage(tmp_path.as_uri())
    assert "train.py" in storage.read("stacks/g0007.rank00002.txt").decode()
    assert storage.read("stacks/g0007.rank00002.nccl.pickle") == b"the record"
    assert [entry.key for entry in storage.list("stacks/g0007.rank00003")] == []


def wait_for_a_byte(reader: int) -> None:
    assert select.select([reader], [], [], 10)[0]


async def test_native_frames_where_py_spy_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program of that name prints is kept beside Python's own stacks."""
    tool = tmp_path / "py-spy"
    tool.write_text(f"#!{sys.executable}\nimport sys\nprint('native frames of', sys.argv[-1])\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    evidence = Evidence(tmp_path.as_uri(), 1, tmp_path)
    await evidence.ask({0: [4321]})
    evidence.keep(0, DUMP)
    await evidence.kept()
    text = open_storage(tmp_path.as_uri()).read("stacks/g0001.rank00000.txt").decode()
    assert "train.py" in text
    assert text.endswith("native frames of 4321\n")


async def test_a_wish_is_found_once_a_generation(tmp_path: Path) -> None:
    """Not one that nobody waits for any more, and not at every look."""
    storage = open_storage(tmp_path.as_uri())
    ask = Ask("w1", "ana", time.time() + 60, 5)

    def looks() -> Wishes:
        return Wishes(storage)

    assert await looks().newest(1) is None
    storage.write(WISH_KEY, json.dumps(ask.to_dict()).encode())
    wishes = looks()
    assert await wishes.newest(1) == ask
    wishes._looked_at = 0.0
    assert await wishes.newest(1) is None
    wishes._looked_at = 0.0
    assert await wishes.newest(2) == ask
    over = Ask("w2", "ana", time.time() - 1, 5)
    storage.write(WISH_KEY, json.dumps(over.to_dict()).encode())
    assert await looks().newest(1) is None
    storage.write(WISH_KEY, b"{")
    assert await looks().newest(1) is None


def test_all_ranks_begin_with_the_same_step() -> None:
    """So far ahead that the wish reaches each of them in time."""
    phases = {"step": {"min": 0.1, "median": 0.1, "max": 0.1}}
    window = wire.Window(0.0, 1, 0, 0, 2, 40, 10, 0.0, None, {}, None, None, phases)
    ask = Ask("w1", "ana", 0.0, 5)
    assert timed(ask, Progress(window=window, newest=40)).not_before == 40 + 2 + 25
    assert timed(ask, Progress(newest=3)).not_before == 3 + 2 + 1
