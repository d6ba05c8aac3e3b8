"""What can be wrong with a job's `run` line, seen before anything starts."""

from __future__ import annotations

import difflib
import re
import shlex
import shutil
from pathlib import Path, PurePath

_SHELL = re.compile(r"[|&;<>$`(){}\n*?~]")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*")
_LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_LAUNCHER_FLAGS = frozenset(
    ("--standalone", "--no-python", "--no_python", "-m", "--module", "--run-path", "--run_path")
)


def problem_of(run: str, workdir: Path, *, prepared: bool) -> str | None:
    """One line, or None when nothing speaks against it.

    `prepared`: the job has a `setup`, which may yet bring the script or the program. A line that
    needs a shell (pipes, variables, several commands) is only checked for a second launcher.
    """
    try:
        words = shlex.split(run)
    except ValueError as error:
        return f"{str(error).lower()}; every quote needs its partner"
    while words and (_ASSIGNMENT.fullmatch(words[0]) or words[0] == "exec"):
        words = words[1:]
    if not words:
        return "no command"
    launcher = _launcher(words)
    if launcher:
        return launcher
    if prepared or _SHELL.search(run):
        return None
    return _missing_script(words, workdir) or _missing_program(words[0], workdir)


def _launcher(words: list[str]) -> str | None:
    """dtp starts the ranks itself; a launcher inside would start each of them several times."""
    rest = _after_launcher(words)
    if rest is None:
        return None
    ranks, module, at = None, False, 0
    while at < len(rest) and rest[at].startswith("-"):
        option, given, value = rest[at].partition("=")
        if option in _LAUNCHER_FLAGS:
            module = module or option in ("-m", "--module")
        elif not given:
            at += 1
            value = rest[at] if at < len(rest) else ""
        if option.replace("-", "_").strip("_") == "nproc_per_node":
            ranks = value
        at += 1
    command = shlex.join(["python", *(["-m"] if module else []), *(rest[at:] or ["train.py"])])
    also = f" and `nproc_per_node: {ranks}`" if ranks and ranks.isdigit() else ""
    return f"dtp is the launcher (it sets RANK, WORLD_SIZE, …); write `run: {command}`{also}"


def _after_launcher(words: list[str]) -> list[str] | None:
    program = PurePath(words[0]).name
    if program == "torchrun":
        return words[1:]
    if _PYTHON.fullmatch(program) and words[1:2] == ["-m"] and words[2:3]:
        return words[3:] if words[2] in _LAUNCHER_MODULES else None
    return None


def _missing_script(words: list[str], workdir: Path) -> str | None:
    program = PurePath(words[0]).name
    if not _PYTHON.fullmatch(program) and program not in ("bash", "sh"):
        return None
    script = next((word for word in words[1:] if not word.startswith("-")), None)
    if script is None or any(word in ("-m", "-c") for word in words[1 : words.index(script)]):
        return None
    if (workdir / script).is_file():
        return None
    return f"{script} is not in {workdir}{_nearest(script, workdir)}"


def _nearest(script: str, workdir: Path) -> str:
    suffix = PurePath(script).suffix
    try:
        there = [p.name for p in workdir.iterdir() if p.suffix == suffix]
    except OSError:
        return ""
    near = difflib.get_close_matches(PurePath(script).name, there, n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else "; is `workdir` right?"


def _missing_program(program: str, workdir: Path) -> str | None:
    if _PYTHON.fullmatch(program):
        return None
    if "/" in program:
        path = workdir / program
        if not path.is_file():
            return f"{program} is not in {workdir}"
        return None if shutil.which(str(path)) else f"{program} cannot be executed; chmod +x it"
    return None if shutil.which(program) else f"{program}: no such program on PATH"
