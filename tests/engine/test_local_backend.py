"""What the local backend promises beyond the contract, with real processes: no duplicate, no
orphan, no stranger killed, nothing forgotten by a controller that starts anew."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from blockbuster import blockbuster_ctx

from dtp_engine.backend import Liveness
from dtp_engine.errors import InfrastructureError, Unreachable, UsageError
from dtp_engine.jobs import AttemptId, JobSpec
from dtp_engine.local import workers
from dtp_engine.local.backend import agent_environment
from dtp_engine.local.ledger import LocalLedger
from dtp_engine.local.machine import Gpu, Hardware, read_hardware
from dtp_engine.local.secrets import read_secrets, store_secrets
from dtp_engine.local.slots import Slots
from dtp_trainer import wire
from dtp_trainer.checkpoints import heads
from dtp_trainer.storage import Storage, open_storage

ONE = AttemptId("digits", 1)
TWO = AttemptId("digits", 2)

Local = Any
"""The `LocalHarness` of conftest.py."""


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with dtp."""
    with subprocess.Popen(["sleep", "1002"], start_new_session=True) as process:
        yield process
        assert process.poll() is None
        process.kill()


def storage_of(local: Local) -> Storage:
    return open_storage((local.path / "storage" / "jobs" / "digits").as_uri())


def committed(storage: Storage, *steps: int) -> None:
    for step in steps:
        generation = heads.raise_generation(storage).generation
        name = wire.checkpoint_name(step, generation)
        heads.commit(storage, wire.CheckpointEntry(name, step, generation, 1, 1, 0.0, 10))


async def launched(local: Local, *numbers: int, **options: Any) -> None:
    await local.backend.launch(local.plan(numbers or (0,), **options))
    for number in numbers or (0,):
        await local.until_running(ONE, number)


# ------------------------------------------------------------------------------- no duplicates


async def test_launch_repeated_after_a_crash_is_one_worker(local: Local) -> None:
    """When the controller died between starting an agent and noting it, the replay starts another;
    the first to claim the worker is the worker, and the other leaves."""
    folder = local.folder(0, ONE)
    await local.backend.launch(local.plan(env={"SLOW": "1"}))
    folder.spawned.unlink()
    await local.backend.launch(local.plan(env={"SLOW": "1"}))
    await local.until(ONE, lambda _: len(local.processes()) == 2)
    (folder.path / "go").touch()
    await local.until_running(ONE)
    await local.until(ONE, lambda _: len(local.processes()) == 1)
    assert [p.pid for p in local.processes()] == [local.pid(ONE)]
    assert (await local.look(ONE)).workers[0].liveness is Liveness.ALIVE


LAUNCHER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from conftest import LocalHarness
async def main():
    local = LocalHarness(Path(sys.argv[2]))
    print("ready", flush=True)
    await local.backend.launch(local.plan([0, 1, 2]))
    print("launched", flush=True)
    await asyncio.sleep(100)
asyncio.run(main())
"""


@pytest.mark.parametrize("wait_ms", [0, 2, 4, 6, 8, 12, 16, 24])
async def test_controller_killed_while_it_launches(local: Local, wait_ms: int) -> None:
    """Killed with -9 at any moment of a launch and replayed by the next controller, each worker is
    one process."""
    command = [sys.executable, "-c", LAUNCHER, str(Path(__file__).parent), str(local.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        await asyncio.sleep(wait_ms / 1000)  # the moment of the kill is what is tried here
        launcher.kill()
    await launched(local, 0, 1, 2)
    await local.until(ONE, lambda _: len(local.processes()) == 3)
    pids = {local.pid(ONE, worker) for worker in range(3)}
    assert {process.pid for process in local.processes()} == pids


async def test_two_controllers_launch_at_once(local: Local) -> None:
    """Two that believe to drive make one worker, not two."""
    other = local.open()
    await asyncio.gather(local.backend.launch(local.plan()), other.launch(local.plan()))
    await local.until_running(ONE)
    await local.until(ONE, lambda _: len(local.processes()) == 1)
    assert (await local.look(ONE)).workers[0].liveness is Liveness.ALIVE
    await other.aclose()


async def test_unclaimed_worker_stopped_never_begins(local: Local) -> None:
    """A worker that is stopped before its agent came to claim it is EXITED and leaves nothing."""
    await local.backend.launch(local.plan(env={"SLOW": "1"}))
    assert (await local.look(ONE)).workers[0].liveness is Liveness.ALIVE
    await local.backend.stop(ONE, [0], grace=timedelta(seconds=30))
    await local.until_exited(ONE)
    assert local.processes() == []


# ---------------------------------------------------------------------------------- no orphans


async def test_what_a_dead_agent_leaves_is_killed(local: Local) -> None:
    """A process that carries the worker's name outlives neither its agent nor the next look, even
    in a session of its own."""
    await launched(local, env={"STRAGGLER": "1"})
    await local.until(ONE, lambda _: len(local.processes()) == 2)
    await local.kill_worker(ONE, 0)
    await local.until_exited(ONE)
    assert local.processes() == []


async def test_recorded_rank_of_a_dead_agent_is_killed(local: Local) -> None:
    """A rank that only its record betrays (its environment is that of a warm process) is killed
    with its agent."""
    await launched(local, env={"RANK": "1"})
    folder = local.folder(0, ONE)
    await local.until(ONE, lambda _: bool(folder.rank_records()))
    rank = psutil.Process(folder.rank_records()[0].pid)
    await local.kill_worker(ONE, 0)
    await local.until_exited(ONE)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


async def test_reused_number_is_left_alone(local: Local, stranger: subprocess.Popen[bytes]) -> None:
    """A process that got the number of a dead rank or agent is neither killed nor taken for it."""
    await launched(local)
    folder = local.folder(0, ONE)
    (folder.scratch / wire.RANKS_FOLDER).mkdir()
    reused = {"pid": stranger.pid, "start_time": psutil.Process(stranger.pid).create_time() - 60}
    (folder.scratch / wire.RANKS_FOLDER / "0.json").write_text(json.dumps(reused))
    await local.kill_worker(ONE, 0)
    folder.claim.write_text(json.dumps(reused))
    await local.until_exited(ONE)
    await local.backend.stop(ONE, [0], grace=timedelta(0))


async def test_warm_process_is_left_alone(local: Local) -> None:
    """A warm process that a dead agent happened to start serves others too, and stays."""
    await launched(local)
    env = {"DTP_LAUNCH": str(local.folder(0, ONE).launch)}
    warm = [sys.executable, "-S", "-c", "input()", "dtp_trainer.ranks.zygote"]
    with subprocess.Popen(warm, env=env, stdin=subprocess.PIPE) as zygote:
        await local.kill_worker(ONE, 0)
        await local.until_exited(ONE)
        assert zygote.poll() is None
        zygote.kill()


async def test_no_zombie_remains(local: Local) -> None:
    """The controller reaps the agents it started."""
    await launched(local, 0, 1)
    await local.kill_worker(ONE, 0)
    await local.finish_worker(ONE, 1, 0)
    for worker in (0, 1):
        await local.until_exited(ONE, worker)
    await local.look(ONE)
    assert psutil.Process().children() == []


async def test_agent_that_lingers_is_killed(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that wrote its exit but does not end is helped, and its own code counts."""
    monkeypatch.setattr(workers, "LINGER_S", 0.05)
    await launched(local, env={"LINGERS": "1"})
    await local.finish_worker(ONE, 0, 4)
    assert (await local.until_exited(ONE)).exit_code == 4


# ------------------------------------------------------------------------------ stop and endings


async def test_one_sigterm_however_often_it_is_asked(local: Local) -> None:
    """Repeated stops, also by another controller, are one SIGTERM."""
    await launched(local, env={"STUBBORN": "1"})
    other = local.open()
    for backend in (local.backend, other, local.backend, other):
        await backend.stop(ONE, [0], grace=timedelta(seconds=30))
    log = local.folder(0, ONE).log
    await local.until(ONE, lambda _: b"asked to stop" in log.read_bytes())
    await local.order(ONE, say=["still here"])
    await local.until(ONE, lambda _: b"still here" in log.read_bytes())
    assert log.read_bytes().count(b"asked to stop") == 1
    await other.aclose()


async def test_kill_follows_when_the_grace_is_over(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ignores SIGTERM is killed by the first stop after its grace."""
    monkeypatch.setattr(workers, "KILL_SLACK_S", 0.05)
    await launched(local, env={"STUBBORN": "1", "STRAGGLER": "1"})
    while (await local.look(ONE)).workers[0].liveness is Liveness.ALIVE:
        await local.backend.stop(ONE, [0], grace=timedelta(seconds=0.05))
        await asyncio.sleep(0.01)
    sight = await local.until_exited(ONE)
    assert (sight.exit_code, sight.detail) == (137, "the worker's agent died: SIGKILL")
    assert local.processes() == []


async def test_agent_that_cannot_start_says_why(local: Local) -> None:
    """An agent that dies before its claim is EXITED with its code and the last line of its log."""
    await local.backend.launch(local.plan(env={"BROKEN": "1"}))
    sight = await local.until_exited(ONE)
    assert sight.exit_code == 1
    assert sight.detail == "did not begin: no module named torch"


async def test_agent_that_cannot_be_executed_is_unreachable(local: Local) -> None:
    """A missing interpreter is an error in one line, and the launch can be repeated."""
    other = local.open(["/no/such/python"])
    with pytest.raises(Unreachable, match="/no/such/python"):
        await other.launch(local.plan())
    await other.aclose()
    await launched(local)


async def test_another_controller_goes_on(local: Local) -> None:
    """A controller that starts anew sees the same workers and the same free capacity."""
    await launched(local, 0, 1)
    before = await local.backend.capacity()
    other = local.open()
    after = await other.capacity()
    seen = (await other.observe([ONE]))[ONE]
    assert (after.free_cpus, after.free_memory_bytes) == (
        before.free_cpus,
        before.free_memory_bytes,
    )
    assert {n: s.liveness for n, s in seen.workers.items()} == dict.fromkeys((0, 1), Liveness.ALIVE)
    await other.aclose()


async def test_end_of_an_agent_of_another_controller(local: Local) -> None:
    """The exit of a worker that somebody else started is seen all the same."""
    other = local.open()
    await other.launch(local.plan())
    await other.aclose()
    await local.finish_worker(ONE, 0, 6)
    sight = await local.until_exited(ONE)
    assert (sight.exit_code, sight.detail) == (6, "told so")


async def test_gang_of_this_attempt_is_shown(local: Local) -> None:
    """``gang.json`` comes with its own attempt, and with no other."""
    await launched(local)
    gang = wire.Gang(1, 1, 0, "127.0.0.1:1", "running", 3, 0.0, step=12)
    storage_of(local).write(wire.GANG_KEY, wire.encode_object(gang))
    assert (await local.look(ONE)).status == gang
    assert (await local.look(TWO)).status is None


async def test_state_folder_that_cannot_be_used_is_unreachable(local: Local) -> None:
    """A disk that does not play along is `Unreachable` in one line, never a traceback."""
    (local.path).mkdir()
    (local.path / "workers").write_text("a file where a folder should be")
    with pytest.raises(Unreachable, match="workers"):
        await local.backend.launch(local.plan())
    (local.path / "workers").unlink()


async def test_event_loop_never_waits_for_the_disk(local: Local, tmp_path: Path) -> None:
    """No method of backend or ledger does blocking work on the event loop."""
    with blockbuster_ctx("dtp_engine"):
        ledger = await LocalLedger.open(tmp_path / "ledger.db")
        await local.backend.launch(local.plan())
        await local.backend.observe([ONE])
        await local.backend.capacity()
        _ = [line async for line in local.backend.logs(ONE)]
        await local.backend.stop(ONE, [0], grace=timedelta(0))
        await ledger.jobs()
        await ledger.aclose()


# ------------------------------------------------------------------------ what a worker is told


async def test_launch_file_is_private_and_whole(local: Local) -> None:
    """An agent reads all it needs from one file that nobody else may read."""
    await launched(local, env={"A": "ü"})
    path = local.folder(0, ONE).launch
    launch = wire.Launch.from_dict(json.loads(path.read_bytes()))
    assert path.stat().st_mode & 0o777 == 0o600
    assert local.folder(0, ONE).path.stat().st_mode & 0o777 == 0o700
    assert (launch.worker, launch.secret, launch.env["A"]) == (0, "secret", "ü")
    assert launch.storage == storage_of(local).uri
    assert launch.scratch == str(local.folder(0, ONE).scratch)


async def test_secrets_reach_the_worker_alone(local: Local) -> None:
    """Values of secrets go through private files into the job's environment."""
    plan = local.plan(secrets=("TOKEN",))
    store_secrets(local.path, "digits", plan.spec, {"TOKEN": "t0p", "OTHER": "x"})
    await local.backend.launch(plan)
    await local.until_running(ONE)
    launch = json.loads(local.folder(0, ONE).launch.read_bytes())
    assert launch["env"]["TOKEN"] == "t0p"
    assert "OTHER" not in launch["env"]
    stored = [p for p in local.path.rglob("*") if p.is_file() and b"t0p" in p.read_bytes()]
    assert {p.name for p in stored} == {"launch.json", "secrets.json"}
    assert {p.stat().st_mode & 0o777 for p in stored} == {0o600}


async def test_secret_that_was_never_stored_ends_the_worker(local: Local) -> None:
    """Without its secret a worker does not begin and says which one is missing."""
    await local.backend.launch(local.plan(secrets=("TOKEN",)))
    sight = await local.until_exited(ONE)
    assert sight.exit_code == wire.ExitCode.SETUP_FAILED
    assert "TOKEN" in sight.detail


def test_secret_not_in_the_environment_is_refused(tmp_path: Path) -> None:
    """A submitter without a value hears so, and nothing is stored."""
    spec = JobSpec("a", "python a.py", secrets=("HF_TOKEN", "PATH"))
    with pytest.raises(UsageError, match="HF_TOKEN"):
        store_secrets(tmp_path, "abc", spec, {"PATH": "/bin"})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InfrastructureError, match="HF_TOKEN, PATH"):
        read_secrets(tmp_path, "abc", spec)


async def test_chosen_checkpoint_is_the_next_start(local: Local) -> None:
    """`resume_from` makes that step's checkpoint the one from which the attempt begins."""
    committed(storage_of(local), 100, 200)
    await local.backend.launch(replace(local.plan(), resume_from=100))
    assert heads.read_head(storage_of(local)).resume == "step-000100.g0001"


async def test_joining_worker_does_not_rewind_the_gang(local: Local) -> None:
    """A worker launched later in the attempt leaves the resume point where the gang has it."""
    storage = storage_of(local)
    committed(storage, 100, 200)
    await local.backend.launch(replace(local.plan(), resume_from=100))
    committed(storage, 300)
    await local.backend.launch(replace(local.plan([0, 1]), resume_from=100))
    assert heads.read_head(storage).resume == "step-000300.g0003"


async def test_checkpoint_that_is_not_there_ends_the_worker(local: Local) -> None:
    """Without the chosen checkpoint no worker begins, and the reason names those that exist."""
    committed(storage_of(local), 100)
    await local.backend.launch(replace(local.plan(), resume_from=150))
    sight = await local.until_exited(ONE)
    assert sight.exit_code == wire.ExitCode.SETUP_FAILED
    assert "150" in sight.detail
    assert "100" in sight.detail


def test_agent_finds_our_python_and_none_of_our_settings() -> None:
    """``python`` is the interpreter that runs dtp, and variables of this process stay here."""
    env = agent_environment({"PATH": "/usr/bin", "DTP_JOB_ID": "x", "HOME": "/home/a"})
    assert env == {"PATH": f"{Path(sys.executable).parent}:/usr/bin", "HOME": "/home/a"}
    assert agent_environment(env) == env


# -------------------------------------------------------------------------------------- machine


def test_cores_are_those_we_may_use() -> None:
    """Affinity limits what is offered."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert read_hardware().cpus <= 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 0 < read_hardware().memory_bytes <= psutil.virtual_memory().total


def test_gpus_are_given_out_once(local: Local) -> None:
    """Each worker sees GPUs of its own; when none is left the next one waits."""
    gpus = tuple(Gpu(f"GPU-{n}", "H", 2**30) for n in range(3))
    slots = Slots(local.home, Hardware("here", 8, 2**34, gpus))
    wanted = replace(local.plan().spec.resources, gpus=2)
    first = slots.reserve(local.folder(0, ONE), wanted)
    assert first is not None
    assert slots.environment(first) == {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"}
    assert slots.reserve(local.folder(0, ONE), wanted) == first
    assert slots.reserve(local.folder(1, ONE), wanted) is None
    assert slots.capacity().free_gpus == 1
    third = slots.reserve(local.folder(2, ONE), replace(wanted, gpus=1))
    assert third is not None
    assert third.gpus == ("GPU-2",)


# ----------------------------------------------------------------------------------------- logs


async def test_awkward_output_is_read_whole(local: Local) -> None:
    """Binary, a line of a megabyte and text that is no line of ours come through, in order."""
    await local.backend.launch(local.plan())
    log = local.folder(0, ONE).log
    long = "x" * 1_000_000
    with log.open("ab") as file:
        file.write(b"\xff\xfe\x00\n" + long.encode() + b"\nlast\n" + b"not yet a line")
    found = [line.text.text for line in await local.read(ONE) if line.text]
    assert found == ["\ufffd\ufffd\0", long, "last"]
    with log.open("ab") as file:
        file.write(b", now\n")
    assert [line.text.text for line in await local.read(ONE) if line.text][3:] == [
        "not yet a line, now"
    ]


async def test_cursor_is_behind_its_line(local: Local) -> None:
    """Every line's cursor goes on with the line after it, whatever the chunks were."""
    await local.backend.launch(local.plan())
    with local.folder(0, ONE).log.open("ab") as file:
        file.writelines(f"{n} {'ü' * (n % 97)}\n".encode() for n in range(20_000))
    lines = await local.read(ONE)
    assert len(lines) == 20_000
    for number in (0, 777, 13_131, 19_998):
        after = {0: lines[number].cursor}
        rest = await local.read(ONE, after)
        assert rest == lines[number + 1 :]


async def test_lines_of_workers_are_merged_by_time(local: Local) -> None:
    """The feed of an attempt is in the order of time over all its workers."""
    await local.backend.launch(local.plan([0, 1]))
    for worker in (0, 1):
        with local.folder(worker, ONE).log.open("a") as file:
            for n in range(3000):
                stamp = f"2026-11-23T08:{n // 60:02}:{n % 60:02}.{worker}00000"
                file.write(f"{stamp}Z [rank{worker}] {n}\n")
    texts = [line.text for line in await local.read(ONE)]
    assert len(texts) == 6000
    assert [t.at for t in texts if t] == sorted(t.at for t in texts if t)


async def test_reading_ends_although_a_worker_writes_on(local: Local) -> None:
    """Without `follow` the feed ends at what was there when it began, however fast a worker
    writes."""
    await local.backend.launch(local.plan())
    found = 0
    with local.folder(0, ONE).log.open("a") as file:
        file.write("first\n" * 500)
        file.flush()
        async for _ in local.backend.logs(ONE):
            found += 1
            file.write("more\n")
            file.flush()
    assert 500 <= found < 1500


async def test_records_and_text_are_told_apart(local: Local) -> None:
    """A record of the wire comes as a record, anything else as text."""
    await local.backend.launch(local.plan())
    ended = wire.Exit(at=5.0, worker=0, code=0, reason="done")
    with local.folder(0, ONE).log.open("a") as file:
        file.write(wire.encode(ended) + "\n" + '{"dtp":1,"kind":"future"}\n')
    record, text = await local.read(ONE)
    assert (record.record, record.text) == (ended, None)
    assert text.text is not None
    assert text.text.at == 5.0
