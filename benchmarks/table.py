"""The README's figures, made from results/*.json: `python -m benchmarks.table` rewrites them."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.measure import HERE, RESULTS

README = HERE.parent / "README.md"
BEGIN, END = "<!-- figures -->\n", "<!-- /figures -->\n"


def table() -> str:
    """Markdown; each row names its file."""
    launch, recovery = _read("launch"), _read("recovery")
    overhead, commands = _read("overhead"), _read("commands")
    ratio, first = launch["ratio_to_torchrun"], launch["first_step_s"]
    kill = recovery["kill_to_first_step_s"]
    wall = commands["seconds"]
    rows = [
        (
            "command → first step, nothing warm",
            _s(first["dtp cold"]),
            f"torchrun {_s(first['torchrun'])} ({ratio['dtp cold']['first_step']:.2f} of it)",
            "launch",
        ),
        (
            "command → first step, warm",
            _s(first["dtp warm"]),
            f"torchrun {_s(first['torchrun'])} ({ratio['dtp warm']['first_step']:.2f} of it)",
            "launch",
        ),
        (
            "command → exit of a short job, warm",
            _s(launch["exit_s"]["dtp warm"]),
            f"torchrun {_s(launch['exit_s']['torchrun'])} ({ratio['dtp warm']['exit']:.2f} of it)",
            "launch",
        ),
        (
            "kill -9 of a rank → both ranks step again",
            f"{_s(kill['dtp'])}, {_hangs(recovery, 'dtp')}",
            f"torchrun {_s(kill['torchrun'])}, {_hangs(recovery, 'torchrun')}",
            "recovery",
        ),
        *_more_recovery(recovery),
        *_scale(),
        (
            "a step with `Session`",
            f"{overhead['ratio_of_medians']:.3f} times",
            "the bare loop, interleaved in one process" + _peers(overhead),
            "overhead",
        ),
        (
            "`dtp --version`, `--help`, `ps --json`",
            ", ".join(_s(wall[f"dtp {name}"]) for name in ("--version", "--help", "ps --json")),
            f"`torchrun --help` {_s(wall['torchrun --help'])}",
            "commands",
        ),
    ]
    lines = ["| what | dtp | beside | file |", "|---|---|---|---|"]
    for what, ours, beside, name in rows:
        lines.append(f"| {what} | {ours} | {beside} | [{name}](benchmarks/results/{name}.json) |")
    return "\n".join(lines) + "\n"


def in_readme() -> str:
    """The table as the README has it."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0].strip() + "\n"


def main() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _peers(overhead: dict[str, Any]) -> str:
    found = overhead.get("beside_bare", {})
    peers = {"accelerate": "accelerate", "fabric": "Lightning Fabric"}
    return "".join(
        f"; {words} {found[name]['ratio_of_medians']:.3f} times"
        for name, words in peers.items()
        if name in found
    )


def _s(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} s"


def _more_recovery(recovery: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Kills of more than a rank, once they were measured."""
    rows = []
    for kind, what in (("agent", "an agent"), ("leader", "the leader's agent")):
        if found := recovery.get(f"{kind}_kill_to_first_step_s"):
            peer = f"torchrun {_s(found['torchrun'])}" if "torchrun" in found else "—"
            rows.append((f"kill -9 of {what} → the rest steps again", _s(found["dtp"]), peer))
    return [(*row, "recovery") for row in rows]


def _scale() -> list[tuple[str, str, str, str]]:
    if not (RESULTS / "scale.json").exists():
        return []
    scale = _read("scale")
    up, down = scale["dtp"]["2 -> 3"], scale["dtp"]["3 -> 2"]
    peer = scale["torchrun"]
    rows = (
        ("2 → 3 workers: the new one is up → all step", up["worker_up_to_first_step_s"], "2 -> 3"),
        (
            "3 → 2 workers: one is asked to leave → the rest steps",
            down["worker_up_to_first_step_s"],
            "3 -> 2",
        ),
    )
    return [
        (
            what,
            f"{_s(ours)}, {scale['dtp'][sign]['steps_redone']} steps redone",
            f"torchrun, from its start or end {_s(peer[sign]['wish_to_first_step_s'])}",
            "scale",
        )
        for what, ours, sign in rows
    ]


def _hangs(recovery: dict[str, Any], name: str) -> str:
    hung = recovery["hangs"][name]
    return f"{hung} hangs of {recovery['kill_to_first_step_s'][name]['n'] + hung}"


if __name__ == "__main__":
    main()
