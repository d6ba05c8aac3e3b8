"""A stand-in for an agent, quick to start: claims its worker, then does what the test writes into
the file ``order`` beside its launch file, one order after the other. Standard library only.

Orders: ``{"say": [lines]}``, ``{"exit": code}``. What it does by itself is set in the job's env:
``STUBBORN`` ignores SIGTERM, ``STRAGGLER`` leaves a process in a session of its own, ``RANK`` one
that is only known by its record, ``LINGERS`` runs on after its exit was written, ``BROKEN`` dies
before its claim, ``SLOW`` claims only when the file ``go`` appears.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PATH = Path(os.environ["DTP_LAUNCH"])
LAUNCH = json.loads(PATH.read_text())
ORDER = PATH.with_name("order")


def start_time(pid: int) -> float:
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    boot = next(x for x in Path("/proc/stat").read_text().splitlines() if x.startswith("btime"))
    return float(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def record(path: Path, pid: int) -> None:
    with path.open("x") as file:
        file.write(json.dumps({"pid": pid, "start_time": start_time(pid)}))


def leave(code: int) -> None:
    draft = PATH.with_name("exit.draft")
    draft.write_text(
        json.dumps({"at": time.time(), "worker": 0, "code": code, "reason": "told so"})
    )
    draft.replace(PATH.with_name("exit.json"))
    while "LINGERS" in LAUNCH["env"]:
        time.sleep(0.01)
    os._exit(code)


def on_sigterm(*_: object) -> None:
    print("asked to stop", flush=True)
    if "STUBBORN" not in LAUNCH["env"]:
        leave(75)


def take_order() -> dict[str, object]:
    try:
        order: dict[str, object] = json.loads(ORDER.read_text())
    except FileNotFoundError:
        return {}
    ORDER.unlink()
    return order


def main() -> None:
    if "BROKEN" in LAUNCH["env"]:
        sys.exit("no module named torch")
    while "SLOW" in LAUNCH["env"] and not PATH.with_name("go").exists():
        time.sleep(0.01)
    try:
        record(PATH.with_name("claim"), os.getpid())
    except FileExistsError:
        sys.exit(78)
    if "STRAGGLER" in LAUNCH["env"]:
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
    if "RANK" in LAUNCH["env"]:
        rank = subprocess.Popen(["sleep", "1001"], start_new_session=True, env={})
        folder = Path(LAUNCH["scratch"]) / "ranks"
        folder.mkdir()
        record(folder / "0.json", rank.pid)
    while True:
        order = take_order()
        for line in order.get("say", ()):  # type: ignore[attr-defined]
            print(line, flush=True)
        if "exit" in order:
            leave(int(str(order["exit"])))
        time.sleep(0.01)


signal.signal(signal.SIGTERM, on_sigterm)
main()
