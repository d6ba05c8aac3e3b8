"""The program as such: help, mistakes, speed of its doors, completion, configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtp_tui.cli import COMMANDS, program
from dtp_tui.commands.options import complete_job


def bare(words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


def test_version(cli: Any) -> None:
    """`--version` is one line."""
    assert cli("--version").stdout.startswith("dtp ")
    assert cli("-V").stdout == cli("--version").stdout


def test_help_lists_every_command(cli: Any) -> None:
    """`dtp --help` names each command in a line that fits 80 columns."""
    shown = cli("--help").stdout
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "..." not in shown.replace("[ARGS]...", "")
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(cli: Any, name: str) -> None:
    """Each command explains itself and all of its arguments within 80 columns."""
    shown = cli(name, "--help").stdout
    assert shown.startswith(f"Usage: dtp {name} ")
    assert "\n  JOB  [required]" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_exit_codes_are_in_the_help(cli: Any) -> None:
    """What run and wait exit with can be read where it is needed."""
    for name in ("run", "wait"):
        shown = " ".join(cli(name, "--help").stdout.split())
        assert "0 succeeded, 1 failed" in shown
        assert "8 paused" in shown


def test_mistakes_are_usage_errors(cli: Any) -> None:
    """A wrong command or option exits with 2 and says the nearest right one."""
    assert "Did you mean 'logs'" in cli("log", code=2).stderr
    assert "--follow" in cli("logs", "x", "--folow", code=2).stderr
    assert "Missing argument" in cli("show", code=2).stderr
    assert "N" in cli("scale", "x", "many", code=2).stderr


def test_only_the_asked_command_is_imported() -> None:
    """`dtp ps` does not pay for the other commands, `--help` not for the engine."""
    code = (
        "import sys\nfrom dtp_tui.cli import program\n"
        "program(['ps'])\nprint('dtp_tui.commands.run' in sys.modules)\n"
        "program()\n"
        "print(sorted({'dtp_engine.engine', 'asyncio', 'yaml', 'rich'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["False", "[]"]


def test_each_command_can_be_built_alone() -> None:
    """The table of commands has a module for each."""
    for name in COMMANDS:
        assert program([name])


# ------------------------------------------------------------------------- errors of every command


@pytest.mark.parametrize(
    "words",
    [
        ("show", "nope"),
        ("logs", "nope"),
        ("pause", "nope"),
        ("resume", "nope"),
        ("scale", "nope", "2"),
        ("stop", "nope"),
        ("kill", "nope"),
        ("wait", "nope"),
        ("events", "nope"),
        ("metrics", "nope"),
        ("ckpt", "ls", "nope"),
        ("ckpt", "pin", "nope", "1"),
    ],
)
def test_an_unknown_job(cli: Any, words: tuple[str, ...]) -> None:
    """Every command that takes a job says in one line that there is none of that name."""
    assert cli.error(*words) == 'no job "nope"; `dtp ps` lists them'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("wait", "x", "--until", "PAUSD"), '--until: no state "PAUSD"; did you mean "PAUSED"?'),
        (("wait", "x", "--timeout", "5"), "--timeout: a duration needs a unit"),
        (("logs", "x", "--rank", "first"), '--rank: expected numbers such as 0 or 0,3, found "fi'),
        (("logs", "x", "--since", "soon"), '--since: "soon" is not a duration'),
        (("logs", "x", "--grep", "("), '--grep: "(" is not an expression'),
        (("run", "nowhere.yaml"), "nowhere.yaml: no such file"),
    ],
)
def test_a_wrong_value(cli: Any, words: tuple[str, ...], message: str) -> None:
    """A wrong value is one line that names the option, and exits with 2."""
    assert cli.error(*words).startswith(message)


def test_a_wrong_job_file(cli: Any) -> None:
    """A mistake in a job file exits with 2, and nothing was submitted."""
    path = cli.job_file("pass", nodes=0)
    assert cli.error("run", path) == f"{path}:3: nodes: must be at least 1, found 0"
    assert cli.error("run", path, "--set", "nodes=x").startswith("--set nodes=x: nodes: expected")
    assert cli.rows("ps") == []


def test_more_than_the_machine_has(cli: Any) -> None:
    """A worker larger than the machine is refused at once, by the dry run as well."""
    path = cli.job_file("pass", resources={"cpus": 4000})
    assert "lower `resources`" in cli.error("run", path)
    assert "lower `resources`" in cli.error("run", path, "--dry-run")


def test_a_state_folder_that_cannot_be(cli: Any) -> None:
    """A state folder that cannot be written is one line, and exits with 7."""
    (cli.folder / "file").write_text("")
    home = str(cli.folder / "file" / "home")
    assert home in cli.error("ps", code=7, DTP_HOME=home)
    assert "fail  state folder" in cli("doctor", code=7, DTP_HOME=home).stdout


def test_a_wrong_config_file(cli: Any) -> None:
    """A mistake in the config file is told with its line by any command."""
    config = cli.folder / "config" / "dtp" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("actor: ana\nhomme: /x\n")
    message = f'{config}:2: homme: unknown setting; did you mean "home"?'
    assert cli.error("ps") == message
    assert cli.error("config", "show") == message


def test_an_error_nobody_foresaw_keeps_its_traceback_in_a_file(cli: Any) -> None:
    """One line on the screen, exit code 7, the traceback in a file of the state folder."""
    code = (
        "import sys, dtp_tui.commands.config as c\n"
        "def fail(): raise RuntimeError('odd')\n"
        "c.app.registered_commands[0].callback = fail\n"
        "sys.argv = ['dtp', 'config', 'show']\n"
        "from dtp_tui.cli import main; main()"
    )
    done = bare([sys.executable, "-c", code], cli.env)
    assert done.returncode == 7
    assert done.stderr.startswith("dtp: internal error: RuntimeError: odd; the details are in ")
    log = Path(done.stderr.split(" in ")[-1].strip())
    assert log.parent == cli.home / "logs"
    assert "Traceback" in log.read_text()


def test_a_reader_that_leaves(cli: Any) -> None:
    """`dtp … | head -1` ends quietly."""
    program = f"{Path(sys.executable).parent / 'dtp'} spec schema | true; exit ${{PIPESTATUS[0]}}"
    done = bare(["bash", "-c", program], cli.env)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_below_the_output(cli: Any) -> None:
    """Output that cannot be written is one line and exit code 7, not silence."""
    program = f"{Path(sys.executable).parent / 'dtp'} spec schema > /dev/full"
    done = bare(["bash", "-c", program], cli.env)
    assert done.returncode == 7
    assert done.stderr == "dtp: the output cannot be written: No space left on device\n"


# ------------------------------------------------------------------------------ this machine


def test_config_show(cli: Any) -> None:
    """Every setting is shown with its value and where that came from."""
    rows = {row["setting"]: row for row in cli.rows("config", "show")}
    assert rows["home"]["value"] == str(cli.home)
    assert rows["home"]["from"] == "DTP_HOME"
    assert rows["lease_ttl"]["from"] == "default"
    assert "DTP_ACTOR" in cli("config", "show").stdout


def test_spec_schema_is_json(cli: Any) -> None:
    """The schema can be read by an editor and knows every field."""
    schema = json.loads(cli("spec", "schema").stdout)
    assert schema["properties"]["checkpoint"]["properties"]["every"]["description"]
    assert "checkpoint.every" in cli("spec", "fields").stdout


def test_spec_check(cli: Any) -> None:
    """A job file can be checked without running it."""
    good = cli.job_file("pass")
    assert cli("spec", "check", good).stdout == f"{good}: hello, good\n"
    bad = cli.job_file("pass", name="bad", nodez=1)
    assert "nodez: unknown field" in cli("spec", "check", good, bad, code=2).stderr


def test_doctor(cli: Any) -> None:
    """A machine that can train passes; each check is a line."""
    rows = {row["check"]: row for row in cli.rows("doctor")}
    assert rows["torch"]["verdict"] == "ok"
    assert rows["ledger"]["found"] == "0 jobs, 0 active"
    assert {"python", "state folder", "free disk", "controller", "gpus"} <= set(rows)
    assert "0 fail" in cli("doctor").stdout


def test_nothing_starts_by_looking(cli: Any) -> None:
    """Reading commands leave no process behind."""
    cli("ps")
    cli("doctor")
    cli("controller", "status")
    assert cli.processes() == []
    assert "no jobs yet" in cli("ps").stdout
    assert cli("controller", "stop").stdout == "no controller was running\n"


# -------------------------------------------------------------------------------------- completion


def complete(cli: Any, line: str) -> list[str]:
    """What bash would offer after this line, by the script that dtp installs."""
    bin_folder = Path(sys.executable).parent
    script = f"""
        PATH={bin_folder}:$PATH
        eval "$(_DTP_COMPLETE=source_bash dtp)"
        COMP_WORDS=({line}"") COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _dtp_completion dtp
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = bare(["bash", "-c", script], cli.env)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands(cli: Any) -> None:
    """Commands are completed in bash."""
    assert {"pause", "ps"} <= set(complete(cli, "dtp p"))
    assert "logs" in complete(cli, "dtp lo")


def test_completion_without_any_state(cli: Any) -> None:
    """Completing a job's name makes no state folder and no noise."""
    assert complete(cli, "dtp show d") == []
    assert not cli.home.exists()


def test_completion_survives_a_broken_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A ledger that cannot be opened completes nothing."""
    (tmp_path / "ledger.db").write_bytes(b"no database at all, and long enough to be read" * 100)
    monkeypatch.setenv("DTP_HOME", str(tmp_path))
    assert complete_job("d") == []


@pytest.mark.parametrize(
    ("words", "code"),
    [("ps", 0), ("ps --json", 0), ("show nosuch", 2), ("run -d nosuch.yaml", 2), ("--version", 0)],
)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_accident(cli: Any, words: str, code: int, closed: str) -> None:
    """A caller that closed stdin, stdout or stderr gets the exit code and no traceback."""
    done = bare(["sh", "-c", f"cd {cli.folder}; {cli.program} {words} {closed}"], cli.env)
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr
    assert "internal error" not in done.stderr
    assert not list(cli.home.glob("logs/crash-*"))


def test_the_dashboard_bears_closed_streams(cli: Any) -> None:
    """`dtp-tui` without streams says that it needs a terminal, to whoever can hear it."""
    for closed in (">&-", "<&-"):
        done = bare(["sh", "-c", f"{cli.program}-tui {closed}"], cli.env)
        assert (done.returncode, done.stdout) == (2, "")
        assert "needs a terminal" in done.stderr
        assert "Traceback" not in done.stderr
