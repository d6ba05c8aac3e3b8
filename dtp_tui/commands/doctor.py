"""`dtp doctor`: is this machine fit to train?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from dtp_tui.commands.options import JsonOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtp_tui.checks import Check
    from dtp_tui.output import Output


def command(*, json_lines: JsonOption = False) -> None:
    """Check whether this machine is fit to train.

    Python, torch, state folder, disk, ledger, controller, GPUs, terminal. Each line is ok, warn
    or fail, with what to do. The exit code is 7 when something fails.
    """
    from dtp_engine.settings import load_settings
    from dtp_tui.checks import Verdict, engine_checks, machine_checks
    from dtp_tui.client import run_to_end
    from dtp_tui.output import Exit, Output

    settings = load_settings()
    found = [*machine_checks(settings), *run_to_end(engine_checks(settings))]
    out = Output(json_lines=json_lines)
    if json_lines:
        for check in found:
            out.emit(_record(check))
    else:
        _print(out, found)
    failed = any(check.verdict is Verdict.FAIL for check in found)
    raise typer.Exit(Exit.INFRASTRUCTURE if failed else Exit.SUCCEEDED)


def _record(check: Check) -> dict[str, object]:
    return {
        "check": check.name,
        "verdict": check.verdict,
        "found": check.found,
        "advice": check.advice,
    }


def _print(out: Output, found: Sequence[Check]) -> None:
    from dtp_tui.checks import Verdict
    from dtp_tui.labels import Tone

    tones = {Verdict.OK: Tone.GOOD, Verdict.WARN: Tone.WARN, Verdict.FAIL: Tone.BAD}
    for check in found:
        verdict = out.paint(f"{check.verdict:<4}", tones[check.verdict])
        out.say(f"{verdict}  {check.name:<16}  {check.found}")
        if check.advice:
            out.say(f"{'':24}→ {check.advice}")
    counts = {v: sum(check.verdict is v for check in found) for v in Verdict}
    out.say("  ".join(f"{count} {verdict}" for verdict, count in counts.items()))
