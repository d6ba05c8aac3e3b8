"""The warm process: one per kind, found by all, gone when idle; and no orphan whoever is killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dtp_trainer.ranks.launcher import RankExit, RankLauncher, RankProcess, RankSpec
from dtp_trainer.ranks.zygote import Inbox, cuda_started, frame
from dtp_trainer.ranks.zygote_client import Unreachable, warm_path

ENV = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": "/nowhere"}
PYTHON = ("python", "train.py")
LIGHT = ("calendar",)
SLEEP = """
    import subprocess, time
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def zygotes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose warm processes leave when the tests of this file are done."""
    folder = tmp_path_factory.mktemp("zygotes")
    yield folder
    for path in folder.glob("*.sock"):
        dismiss(path)


@pytest.fixture
async def launcher(zygotes: Path) -> AsyncIterator[RankLauncher]:
    async with RankLauncher(zygotes=zygotes, idle_s=60, preload=LIGHT) as found:
        yield found


def dismiss(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.send(frame({"idle_s": 0.01}))
        connection.recv(4096)


def spec(folder: Path, source: str, **env: str) -> RankSpec:
    (folder / "train.py").write_text(textwrap.dedent(source))
    return RankSpec(PYTHON, {**ENV, **env}, str(folder))


def zygote_pid(path: Path) -> int:
    """As the warm process at this socket tells it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        (hello,) = Inbox().feed(connection.recv(4096))
    return int(hello["ready"])


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_gone(*pids: int) -> None:
    await until(lambda: not any(alive(pid) for pid in pids))


async def first_line(rank: RankProcess) -> str:
    return (await rank.stdout.readline()).decode().strip()


# ------------------------------------------------------------------------------------ its own life


async def test_several_that_start_one_at_once_share_it(tmp_path: Path) -> None:
    """Of five agents that find no warm process, all are served by the same one."""
    launchers = [RankLauncher(zygotes=tmp_path, idle_s=0.1, preload=LIGHT) for _ in range(5)]
    order = spec(tmp_path, "import os; print(os.getppid())")
    ranks = await asyncio.gather(*(launcher.start(order) for launcher in launchers))
    parents = {await first_line(rank) for rank in ranks}
    await asyncio.gather(*(launcher.aclose() for launcher in launchers))
    assert len(parents) == 1


async def test_it_serves_one_agent_after_another(zygotes: Path, tmp_path: Path) -> None:
    """A second job on this machine meets the process that the first one started."""
    order = spec(tmp_path, "import os; print(os.getppid())")
    parents = []
    for _ in range(2):
        async with RankLauncher(zygotes=zygotes, idle_s=60, preload=LIGHT) as launcher:
            parents.append(await first_line(await launcher.start(order)))
    assert parents[0] == parents[1]


async def test_it_leaves_when_idle_and_a_successor_starts(tmp_path: Path) -> None:
    """Nobody connected for the idle time: the process and its socket are gone; the next agent gets
    a new one."""
    path = warm_path(tmp_path, ENV, LIGHT)
    order = spec(tmp_path, "import os; print(os.getppid())")
    pids = []
    for _ in range(2):
        async with RankLauncher(zygotes=tmp_path, idle_s=0.05, preload=LIGHT) as launcher:
            pids.append(int(await first_line(await launcher.start(order))))
        await until_gone(pids[-1])
        assert not path.exists()
    assert pids[0] != pids[1]


async def test_it_leaves_a_name_that_is_no_longer_its_own(tmp_path: Path) -> None:
    """The folder was made anew: the old process leaves, its successor's socket stays."""
    path = warm_path(tmp_path, ENV, LIGHT)
    order = spec(tmp_path, "import os; print(os.getppid())")
    async with RankLauncher(zygotes=tmp_path, idle_s=0.05, preload=LIGHT) as launcher:
        first = int(await first_line(await launcher.start(order)))
        for file in (path, path.with_suffix(".lock")):
            file.unlink()
        async with RankLauncher(zygotes=tmp_path, idle_s=60, preload=LIGHT) as other:
            second = int(await first_line(await other.start(order)))
            await launcher.aclose()
            await until_gone(first)
            assert zygote_pid(path) == second != first
    dismiss(path)


async def test_it_stays_while_an_agent_is_connected(tmp_path: Path) -> None:
    """Idle means nobody there: an agent between two generations keeps its warm process."""
    order = spec(tmp_path, "import os; print(os.getppid())")
    async with RankLauncher(zygotes=tmp_path, idle_s=0.01, preload=LIGHT) as launcher:
        first = await first_line(await launcher.start(order))
        await asyncio.sleep(0.1)
        assert await first_line(await launcher.start(order)) == first


async def test_it_waits_out_its_time_after_a_long_visit(tmp_path: Path) -> None:
    """The idle time begins when the last agent leaves, however long it was there."""
    order = spec(tmp_path, "import os; print(os.getppid())")
    parents = []
    for stay_s in (3.2, 0.0):
        async with RankLauncher(zygotes=tmp_path, idle_s=3.0, preload=LIGHT) as launcher:
            parents.append(await first_line(await launcher.start(order)))
            await asyncio.sleep(stay_s)
    assert parents[0] == parents[1]


async def test_the_environment_at_import_names_it(tmp_path: Path) -> None:
    """Ranks share a process only with the variables that libraries read when they are imported."""
    base = warm_path(tmp_path, ENV, LIGHT)
    assert warm_path(tmp_path, ENV | {"RANK": "1", "OMP_NUM_THREADS": "2"}, LIGHT) == base
    for name in ("TORCH_LOGS", "LD_PRELOAD", "PYTHONHASHSEED", "MKL_NUM_THREADS"):
        assert warm_path(tmp_path, ENV | {name: "1"}, LIGHT) != base
    assert warm_path(tmp_path, ENV, ("numpy",)) != base


async def test_a_hash_seed_is_honoured(tmp_path: Path) -> None:
    """What only a fresh interpreter could take up is given to the warm process itself."""
    order = spec(tmp_path, "print(hash('dtp'))", PYTHONHASHSEED="0")
    seen = []
    for env in ({}, {"DTP_NO_ZYGOTE": "1"}):
        async with RankLauncher(zygotes=tmp_path, idle_s=0.05, preload=LIGHT) as launcher:
            rank = await launcher.start(RankSpec(PYTHON, {**order.env, **env}, order.cwd))
            seen.append(await first_line(rank))
    assert seen[0] == seen[1]


async def test_a_deep_folder_still_gets_a_socket(tmp_path: Path) -> None:
    """The path of a unix socket holds 107 bytes; a longer one moves to a short private folder."""
    deep = tmp_path / ("d" * 120)
    async with RankLauncher(zygotes=deep, idle_s=0.05, preload=LIGHT) as launcher:
        rank = await launcher.start(spec(tmp_path, "print('up')"))
        assert await first_line(rank) == "up"
    path = warm_path(deep, ENV, LIGHT)
    assert len(os.fsencode(path)) <= 107
    assert path.parent.stat().st_mode & 0o777 == 0o700
    await until(lambda: not path.exists())
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Who connects hands over the job's environment, so the folder must be this user's alone."""
    if os.getuid():
        pytest.skip("giving a folder away needs root")
    os.chown(tmp_path, 1, 1)
    with pytest.raises(Unreachable, match="not a folder of this user"):
        warm_path(tmp_path, ENV, LIGHT)
    os.chown(tmp_path, 0, 0)


async def test_without_a_warm_process_ranks_start_afresh(tmp_path: Path) -> None:
    """A folder that cannot be used costs time, not the job."""
    (tmp_path / "file").write_text("")
    async with RankLauncher(zygotes=tmp_path / "file", preload=LIGHT) as launcher:
        await launcher.warm(spec(tmp_path, "print('up')"))
        rank = await launcher.start(spec(tmp_path, "print('up')"))
        assert await first_line(rank) == "up"


async def test_threads_after_the_imports_mean_fresh_interpreters(tmp_path: Path) -> None:
    """A fork would not take threads along; such a warm process executes instead of forking."""
    (tmp_path / "threaded.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    order = spec(tmp_path, "import sys; print('threaded' in sys.modules)")
    path = warm_path(tmp_path, ENV, ("threaded",))
    command = (
        sys.executable,
        "-P",
        "-m",
        "dtp_trainer.ranks.zygote",
        "--socket",
        str(path),
    )
    subprocess.run(
        [*command, "--preload", "threaded", "--idle", "60"],
        env={**ENV, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.DEVNULL,
        check=True,
    )
    async with RankLauncher(zygotes=tmp_path, idle_s=0.05, preload=("threaded",)) as launcher:
        rank = await launcher.start(order)
        assert await first_line(rank) == "False"
        assert psutil.Process(zygote_pid(path)).num_threads() == 2


async def test_a_module_that_cannot_be_imported_is_left_out(tmp_path: Path) -> None:
    """Without torch (or with a broken one) the process still forks."""
    async with RankLauncher(
        zygotes=tmp_path, idle_s=0.05, preload=("no_such_module", "calendar")
    ) as launcher:
        rank = await launcher.start(spec(tmp_path, "import sys; print('calendar' in sys.modules)"))
        assert await first_line(rank) == "True"


async def test_nonsense_from_one_client_is_no_ones_trouble(
    launcher: RankLauncher, zygotes: Path, tmp_path: Path
) -> None:
    """A broken client loses its connection; another's ranks go on."""
    rank = await launcher.start(spec(tmp_path, "import time; print('up'); time.sleep(600)"))
    for message in (b"\0\0\0\2xx", frame({"id": 1}), frame({"id": 1, "argv": ["x"]})):
        with socket.socket(socket.AF_UNIX) as broken:
            broken.settimeout(20)
            broken.connect(str(warm_path(zygotes, ENV, LIGHT)))
            broken.send(message)
            while broken.recv(4096):
                pass
    assert await first_line(rank) == "up"
    assert rank.exit is None


# ---------------------------------------------------------------------------------- who is killed


CLIENT = """
    import asyncio, json, sys
    from pathlib import Path
    from dtp_trainer.ranks.launcher import RankLauncher, RankSpec
    async def main():
        zygotes, folder, env = json.loads(sys.argv[1])
        launcher = RankLauncher(zygotes=Path(zygotes), preload=("calendar",))
        shell = ("bash", "-c", "sleep 600 & echo $!; python train.py; true")
        for argv in (("python", "train.py"), ("python", "train.py"), shell):
            rank = await launcher.start(RankSpec(argv, env, folder))
            print(rank.pid, int(await rank.stdout.readline()), flush=True)
        print("all up", flush=True)
        await asyncio.sleep(600)
    asyncio.run(main())
"""


async def test_a_killed_agent_leaves_nothing(zygotes: Path, tmp_path: Path) -> None:
    """kill -9 of the agent: its forked and its executed ranks go, and their children, at once; the
    warm process stays."""
    spec(tmp_path, SLEEP)
    (tmp_path / "client.py").write_text(textwrap.dedent(CLIENT))
    said = json.dumps([str(zygotes), str(tmp_path), ENV])
    client = subprocess.Popen(
        [sys.executable, "client.py", said], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert client.stdout
    with client.stdout:
        lines = list(iter(client.stdout.readline, "all up\n"))
        client.kill()
    client.wait()
    pids = [int(word) for line in lines for word in line.split()]
    assert len(pids) == 6
    await until_gone(*pids)
    assert alive(zygote_pid(warm_path(zygotes, ENV, LIGHT)))


@pytest.mark.parametrize("env", [{}, {"DTP_NO_ZYGOTE": "1"}], ids=["forked", "executed"])
async def test_a_killed_parent_leaves_nothing_and_is_replaced(
    tmp_path: Path, env: dict[str, str]
) -> None:
    """kill -9 of the process that forks: ranks and their children go, the agent is told, and its
    next rank has a new parent."""
    async with RankLauncher(zygotes=tmp_path, idle_s=0.05, preload=LIGHT) as launcher:
        ranks = [await launcher.start(spec(tmp_path, SLEEP, **env)) for _ in range(2)]
        children = [int(await first_line(rank)) for rank in ranks]
        parent = psutil.Process(ranks[0].pid).ppid()
        os.kill(parent, signal.SIGKILL)
        assert [await rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
        assert not any(alive(rank.pid) for rank in ranks)
        assert ranks[0].exit
        assert ranks[0].exit.error == "the process that it was forked from was killed"
        await until_gone(*children)
        again = await launcher.start(spec(tmp_path, "import os; print(os.getppid())", **env))
        assert int(await first_line(again)) != parent


async def test_a_killed_parent_with_a_killed_agent_leaves_no_rank(
    zygotes: Path, tmp_path: Path
) -> None:
    """Everything at once: the kernel ends what nobody is left to end."""
    spec(tmp_path, "import time; print(0, flush=True); time.sleep(600)")
    (tmp_path / "client.py").write_text(textwrap.dedent(CLIENT))
    said = json.dumps([str(zygotes), str(tmp_path), ENV])
    client = subprocess.Popen(
        [sys.executable, "client.py", said], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert client.stdout
    with client.stdout:
        ranks = [int(client.stdout.readline().split()[0]) for _ in range(2)]
        os.kill(psutil.Process(ranks[0]).ppid(), signal.SIGKILL)
        client.kill()
    client.wait()
    await until_gone(*ranks)


async def test_closing_the_launcher_ends_its_ranks_only(zygotes: Path, tmp_path: Path) -> None:
    """Two agents share a warm process; one leaves, the other's ranks go on."""
    async with RankLauncher(zygotes=zygotes, preload=LIGHT) as staying:
        other = await staying.start(spec(tmp_path, SLEEP))
        async with RankLauncher(zygotes=zygotes, preload=LIGHT) as leaving:
            rank = await leaving.start(spec(tmp_path, SLEEP))
            child = int(await first_line(rank))
        assert rank.exit
        assert rank.exit.code == -signal.SIGKILL
        await until_gone(child)
        assert alive(other.pid)


async def test_a_cancelled_start_leaves_no_rank(launcher: RankLauncher, tmp_path: Path) -> None:
    """A start that is given up while it waits kills what comes of it."""
    marks = tmp_path / "marks"
    marks.mkdir()
    source = "import os, sys, time; open(f'marks/{os.getpid()}', 'w').close(); time.sleep(600)"
    order = spec(tmp_path, source)
    await launcher.warm(order)
    for delay in range(10):
        start = asyncio.create_task(launcher.start(order))
        for _ in range(delay):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait([start])
        if not start.cancelled():
            start.result().kill()
    last = await launcher.start(spec(tmp_path, "print('up')"))
    assert await first_line(last) == "up"
    await until_gone(*(int(mark.name) for mark in marks.iterdir()))


# --------------------------------------------------------------------------------------- with torch


ALL_REDUCE = """
    import os, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    print(total.item(), torch.get_num_threads())
    dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def test_two_forked_ranks_form_a_process_group(zygotes: Path, tmp_path: Path) -> None:
    """DDP over gloo between two forks, and the handle tells that there was a group; a script that
    only imports torch is told apart; so is a rank killed after it formed one."""
    async with RankLauncher(zygotes=zygotes, idle_s=60) as launcher:
        env = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        await launcher.warm(spec(tmp_path, ALL_REDUCE))
        warm_s = time.perf_counter() - started
        env |= {"MASTER_PORT": str(free_port())}
        started = time.perf_counter()
        ranks = [
            await launcher.start(spec(tmp_path, ALL_REDUCE, RANK=str(rank), **env))
            for rank in range(2)
        ]
        assert [await rank.wait() for rank in ranks] == [0, 0]
        print(f"warm-up {warm_s:.2f} s, two ranks {time.perf_counter() - started:.3f} s")
        assert [await first_line(rank) for rank in ranks] == ["3.0 1", "3.0 1"]
        assert [rank.exit for rank in ranks] == [RankExit(0, formed_group=True, error=None)] * 2

        alone = await launcher.start(spec(tmp_path, "import torch; print(torch.rand(1).item())"))
        again = await launcher.start(spec(tmp_path, "import torch; print(torch.rand(1).item())"))
        assert await first_line(alone) != await first_line(again)
        assert await alone.wait() == 0
        assert alone.exit == RankExit(0, formed_group=False, error=None)

        killed = "import os, torch.distributed as d; d.init_process_group('gloo'); os.abort()"
        env |= {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": str(free_port())}
        rank = await launcher.start(spec(tmp_path, killed, **env))
        assert await rank.wait() == -signal.SIGABRT
        assert rank.exit
        assert rank.exit.formed_group is True


@pytest.mark.gpu
async def test_a_forked_rank_uses_the_gpu(zygotes: Path, tmp_path: Path) -> None:
    """The imports of the warm process leave CUDA alone, so that it starts in each fork."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs a GPU")
    source = "import os, torch; print(torch.ones(3, device='cuda').sum().item(), os.getppid())"
    async with RankLauncher(zygotes=zygotes, idle_s=60) as launcher:
        for _ in range(2):
            rank = await launcher.start(spec(tmp_path, source))
            assert (await first_line(rank)).split()[0] == "3.0"
            assert await rank.wait() == 0
            assert rank.exit
            assert rank.exit.formed_group is False, "it was executed afresh, not forked"


def test_cuda_is_not_started_where_it_is_not_loaded() -> None:
    """The question itself loads no driver and starts none."""
    assert not cuda_started()
