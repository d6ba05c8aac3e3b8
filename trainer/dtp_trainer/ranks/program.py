"""Run a user's Python program in this process as a fresh interpreter would: a script or ``-m``.

What a script can see is set anew: `sys.argv`, `sys.path`, ``__main__``, text streams, random
seeds, numbers of threads. What it leaves is handled as Python does: tracebacks without frames of
ours, `SystemExit`, threads that are still running, `atexit`.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib.machinery
import io
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TextIO


@dataclass(frozen=True, slots=True)
class Program:
    """A Python command, taken apart."""

    target: str
    """Path of a script as given, or the dotted name of a module."""
    arguments: tuple[str, ...]
    module: bool
    unbuffered: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """How a program ended."""

    code: int
    """0..255, or minus a signal's number when Python would have died of it (SIGINT)."""
    error: str | None
    """One line about the exception that nobody caught."""


def parse(argv: Sequence[str]) -> Program | None:
    """The program of ``python [-u] script.py …`` or ``python [-u] -m module …``; None for any
    other way to call an interpreter."""
    unbuffered = False
    for at, word in enumerate(argv[1:], start=1):
        if word == "-u":
            unbuffered = True
        elif word == "-m" and at + 1 < len(argv):
            return Program(argv[at + 1], tuple(argv[at + 2 :]), module=True, unbuffered=unbuffered)
        elif word.startswith("-") or not word.endswith(".py"):
            return None
        else:
            return Program(word, tuple(argv[at + 1 :]), module=False, unbuffered=unbuffered)
    return None


def search_path(program: Program, env: Mapping[str, str]) -> tuple[str, ...]:
    """The folders that a fresh interpreter puts before its own in `sys.path`, from the current
    folder: the script's (or the current one for ``-m``), then those of PYTHONPATH."""
    entries = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    folders = [os.path.abspath(entry) for entry in entries]  # noqa: PTH100 - as `site` does
    if env.get("PYTHONSAFEPATH"):
        return tuple(folders)
    own = os.getcwd() if program.module else os.path.dirname(os.path.realpath(program.target))  # noqa: PTH109, PTH120
    return (own, *folders)


def shadowing(folders: Iterable[str]) -> str | None:
    """A loaded module that a fresh interpreter would have imported from `folders` instead, such as
    a `queue.py` beside the script; None when there is none."""
    for folder in folders:
        try:
            entries = os.listdir(folder)  # noqa: PTH208 - names are enough, and there may be many
        except OSError:
            continue
        for entry in entries:
            name = entry.partition(".")[0]
            module = sys.modules.get(name)
            if module and _importable(folder, entry) and not _is_from(module, folder):
                return name
    return None


def _importable(folder: str, entry: str) -> bool:
    if entry.partition(".")[0] in (*sys.builtin_module_names, "__main__"):
        return False
    if entry.endswith((".py", *importlib.machinery.EXTENSION_SUFFIXES)):
        return True
    return Path(folder, entry, "__init__.py").is_file()


def _is_from(module: ModuleType, folder: str) -> bool:
    origin = getattr(module, "__file__", None)
    if origin is None:
        return False
    found = Path(origin).parent.parent if hasattr(module, "__path__") else Path(origin).parent
    return found.resolve() == Path(folder).resolve()


# --------------------------------------------------------------------------- the interpreter, anew


def prepare(program: Program, argv: Sequence[str], path: Sequence[str]) -> None:
    """Make this interpreter look as if it had just started `program` with `argv`, with `path` as
    `sys.path`. The environment and the current folder must be the program's already."""
    sys.orig_argv[:] = argv
    sys.argv[:] = ["-m" if program.module else program.target, *program.arguments]
    sys.path[:] = path
    sys.modules["__main__"] = _fresh_main()
    _fresh_streams(unbuffered=program.unbuffered or bool(os.environ.get("PYTHONUNBUFFERED")))
    time.tzset()
    tempfile.tempdir = None
    _reseed()
    _set_threads()


def _fresh_main() -> ModuleType:
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={}, __cached__=None)
    return main


def _fresh_streams(*, unbuffered: bool) -> None:
    """Line by line even into a pipe: a log is live, and a killed rank's last words are in it."""
    sys.stdout = sys.__stdout__ = _stream(1, sys.stdout, unbuffered=unbuffered)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, sys.stderr, unbuffered=unbuffered)  # type: ignore[misc]


def _stream(fd: int, like: TextIO, *, unbuffered: bool) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "w", closefd=False)
    buffer = raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=like.encoding,
        errors=like.errors,
        line_buffering=True,
        write_through=unbuffered,
    )


def _reseed() -> None:
    """`random` reseeds itself when a process forks; these do not."""
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    if process := sys.modules.get("multiprocessing.process"):
        process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined] # noqa: PTH109
        process.current_process().authkey = os.urandom(32)


def _set_threads() -> None:
    """Numbers of threads that libraries took from the environment when they were loaded."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wanted.isdigit() and int(wanted) > 0 and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(wanted))
    wanted = os.environ.get("OPENBLAS_NUM_THREADS", wanted)
    limit = int(wanted) if wanted.isdigit() else len(os.sched_getaffinity(0))
    if "numpy" in sys.modules and limit > 1:
        _set_openblas_threads(limit)


def _set_openblas_threads(threads: int) -> None:
    """OpenBLAS starts its threads when it is loaded, unless told to have one; a process that forks
    must have told it so."""
    maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    for library in {line.split()[-1] for line in maps if "openblas" in line and ".so" in line}:
        loaded = ctypes.CDLL(library)
        for suffix in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
            if hasattr(loaded, suffix):
                getattr(loaded, suffix)(threads)
                break


# --------------------------------------------------------------------------------------- the run


def run(program: Program, *, examine: Callable[[TracebackType], None] | None = None) -> Ending:
    """Run a prepared program to its end: its threads joined, its `atexit` done, its output flushed.
    Uncaught exceptions are printed and left in TORCHELASTIC_ERROR_FILE as torchrun's ranks do;
    `examine` is given where they came from, before anything is taken down."""
    ending = _guarded(lambda: _execute(program), examine)
    _guarded(threading._shutdown)  # type: ignore[attr-defined] # noqa: SLF001 - as Python ends
    atexit._run_exitfuncs()  # noqa: SLF001
    flushed = _flush()
    _flush_files()
    return ending if ending.code else Ending(flushed, ending.error)


def _execute(program: Program) -> None:
    if program.module:
        runpy._run_module_as_main(program.target)  # type: ignore[attr-defined] # noqa: SLF001
        return
    path = os.path.abspath(program.target)  # noqa: PTH100 - `resolve` would follow links
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        text = f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
        sys.stderr.write(text + "\n")
        raise _CannotOpen(text) from None
    main = sys.modules["__main__"].__dict__
    main.update(__file__=path, __loader__=importlib.machinery.SourceFileLoader("__main__", path))
    exec(compile(source, path, "exec", dont_inherit=True), main)  # noqa: S102 - it is what we are for


class _CannotOpen(Exception):
    """The script itself; already said on stderr."""


def _guarded(
    call: Callable[[], object], examine: Callable[[TracebackType], None] | None = None
) -> Ending:
    try:
        call()
    except SystemExit as leaving:
        return _left(leaving.code)
    except _CannotOpen as error:
        return Ending(2, str(error))
    except BaseException as error:  # noqa: BLE001 - the outermost frame of a program
        ending = _failed(error)
        if examine is not None and error.__traceback__ is not None:
            examine(error.__traceback__)
        return ending
    return Ending(0, None)


def _left(code: object) -> Ending:
    if code is None:
        return Ending(0, None)
    if isinstance(code, int):
        return Ending(code & 0xFF, None)
    sys.stderr.write(f"{code}\n")
    return Ending(1, _one_line(str(code)))


def _failed(error: BaseException) -> Ending:
    error.__traceback__ = _without_us(error.__traceback__)
    _print(error)
    line = describe(error)
    if isinstance(error, KeyboardInterrupt):
        return Ending(-signal.SIGINT, line)
    _leave_error_file(error)
    return Ending(1, line)


def _without_us(trace: TracebackType | None) -> TracebackType | None:
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def _print(error: BaseException) -> None:
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except BaseException:  # noqa: BLE001 - the user's own hook failed: Python's prints the error
        sys.__excepthook__(type(error), error, error.__traceback__)


def describe(error: BaseException) -> str:
    """
    >>> describe(ValueError("bad lr"))
    'ValueError: bad lr'
    """
    text = _one_line(f"{type(error).__name__}: {error}".rstrip(": "))
    if isinstance(error, SyntaxError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)] or frames
    return f"{text} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else text


def _is_library(filename: str) -> bool:
    folders = ("site-packages", "dist-packages", str(Path(os.__file__).parent))
    return filename.startswith("<frozen ") or any(folder in filename for folder in folders)


def _one_line(text: str) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= 300 else line[:299] + "…"


def _leave_error_file(error: BaseException) -> None:
    """In the form of torch's `ErrorHandler`, unless ``@record`` wrote one already."""
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name or Path(name).exists():
        return
    stack = "".join(traceback.format_exception(error))
    extra = {"py_callstack": stack, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
    try:
        Path(name).write_text(json.dumps({"message": message}))
    except OSError as problem:
        sys.stderr.write(f"dtp: cannot write {name}: {problem}\n")


def _flush() -> int:
    """120, as Python exits, when output could not be written."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream and not stream.closed:
                stream.flush()
    except (OSError, ValueError):
        return 120
    return 0


def _flush_files() -> None:
    """Files that the program left open: destroying them would flush them, but nothing is destroyed
    here. (Objects from before the fork are frozen and do not appear.)"""
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]
    for file in sorted(found, key=lambda thing: not isinstance(thing, io.TextIOWrapper)):
        with contextlib.suppress(OSError, ValueError):
            file.flush()
