"""Job YAML → `JobSpec`. Every error is one line: file, line, field, what is wrong, the right name.

``job.yaml:4: resorces: unknown field; did you mean "resources"?``
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from dtp_engine import commandline
from dtp_engine.errors import SpecError, UsageError
from dtp_engine.fieldkinds import Field, Section, parse_switch, wrong
from dtp_engine.jobs import CheckpointPolicy, JobSpec, Resources, RetryPolicy, Wandb, Watchdog
from dtp_engine.quantities import write_duration, write_size
from dtp_engine.specfields import (
    FIELDS,
    SYNONYMS,
    json_schema,
    walk,
)
from dtp_engine.yamltree import (
    Entry,
    Scalar,
    Table,
    Tree,
    kind_of,
    parse_table,
    parse_value,
    read_table,
)
from dtp_trainer.options import Options

__all__ = ["as_fields", "json_schema", "parse_spec", "read_spec", "walk"]


@dataclass(frozen=True, slots=True)
class _Found:
    value: Any
    tree: Tree


_Values = dict[str, _Found]
"""Dotted path of a field → what was written."""


def read_spec(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> JobSpec:
    """The job that a file describes; ``-`` reads standard input. Raises `SpecError`.

    `overrides` are ``field=value`` as given to ``--set``, applied in order; `name` wins over all.
    Relative `workdir`s begin at the file's folder.
    """
    if str(path) == "-":
        table = parse_table(sys.stdin.buffer.read(), "stdin")
        return _parse(table, Path.cwd(), "job", overrides, name, environ)
    if path.suffix == ".py" and path.is_file():
        hint = f"write a job file with `run: python {path.name}`"
        raise SpecError(f"{path}: this is a script, not a job file; {hint}")
    table = read_table(path)
    return _parse(table, path.resolve().parent, path.stem, overrides, name, environ)


def parse_spec(
    text: str, *, folder: Path, overrides: Sequence[str] = (), environ: Mapping[str, str]
) -> JobSpec:
    """The job that a text describes; messages call it ``job``. Raises `SpecError`."""
    return _parse(parse_table(text.encode(), "job"), folder, "job", overrides, None, environ)


def _parse(
    table: Table,
    folder: Path,
    stem: str,
    overrides: Sequence[str],
    name: str | None,
    environ: Mapping[str, str],
) -> JobSpec:
    for override in overrides:
        table = _override(table, override)
    if name is not None:
        table = _put(table, ["name"], Scalar("--name", name, empty=not name), "--name")
    values = _collect(table, FIELDS)
    _one_of_run_and_task(table, values)
    return _build(values, folder, _safe_name(stem), environ)


def _safe_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:63] or "job"


# --------------------------------------------------------------------------------------- overrides


def _override(table: Table, override: str) -> Table:
    path, given, text = override.partition("=")
    where = f"--set {override}"
    if not given or not path.strip():
        raise UsageError(f"{where}: write it as field=value, such as checkpoint.every=30s")
    nested = text.lstrip().startswith(("[", "{"))
    value = parse_value(text, where) if nested else Scalar(where, text, empty=not text)
    return _put(table, path.strip().split("."), value, where)


def _put(table: Table, path: Sequence[str], value: Tree, where: str) -> Table:
    """The table with one value replaced or added; what is in the way is left for `_collect`."""
    head, *rest = path
    old = table.get(head)
    if rest:
        inner = old.value if old and isinstance(old.value, Table) else Table(where, ())
        value = _put(inner, rest, value, where)
    others = tuple(entry for entry in table.entries if entry.key != head)
    return Table(table.where, (*others, Entry(where, head, value)))


# ------------------------------------------------------------------------------------------ fields


def _collect(table: Table, fields: Iterable[Field | Section], prefix: str = "") -> _Values:
    known = {item.name: item for item in fields}
    values: _Values = {}
    for entry in table.entries:
        item = known.get(entry.key)
        path = prefix + entry.key
        if item is None:
            raise SpecError(f"{entry.where}: {path}: unknown field{_did_you_mean(entry, prefix)}")
        if isinstance(item, Field):
            values[path] = _Found(item.kind.read(path, entry.value), entry.value)
        else:
            values |= _collect_section(item, entry.value, path)
    return values


def _collect_section(section: Section, tree: Tree, path: str) -> _Values:
    if section.switch and not isinstance(tree, Table):
        return {path: _Found(_switch(section, tree, path), tree)}
    if isinstance(tree, Scalar) and tree.empty:
        return {}
    if not isinstance(tree, Table):
        raise wrong(tree, path, f"expected {_fields_of(section)}, found {kind_of(tree)}")
    on = {path: _Found(value=True, tree=tree)} if section.switch else {}
    return on | _collect(tree, section.fields, f"{path}.")


def _switch(section: Section, tree: Tree, path: str) -> bool:
    problem = f"expected true, false or {_fields_of(section)}, found {kind_of(tree)}"
    if not isinstance(tree, Scalar):
        raise wrong(tree, path, problem)
    try:
        return parse_switch(tree.text)
    except ValueError:
        raise wrong(tree, path, problem) from None


def _fields_of(section: Section) -> str:
    return f"fields ({', '.join(inner.name for inner in section.fields)})"


def _did_you_mean(entry: Entry, prefix: str) -> str:
    """The nearest right name on this level, what others call it, or the level it belongs to."""
    paths = [reference.path for reference in walk()]
    levels = {path.rpartition(".")[0] for path in paths} - {""}
    here = [p.removeprefix(prefix) for p in (*paths, *levels) if p.startswith(prefix)]
    here = [name for name in here if "." not in name]
    synonym = SYNONYMS.get(entry.key.lower())
    if synonym and not prefix:
        return f'; did you mean "{synonym}"?'
    if synonym and synonym.startswith(prefix):
        return f'; did you mean "{synonym.removeprefix(prefix)}"?'
    elsewhere = [path for path in (*paths, *levels) if path.rpartition(".")[2] == entry.key]
    if elsewhere:
        return f'; did you mean "{elsewhere[0]}"?'
    near = difflib.get_close_matches(entry.key.lower().replace("-", "_"), here, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; fields here: {', '.join(dict.fromkeys(here))}" if prefix else ""


def _one_of_run_and_task(table: Table, values: _Values) -> None:
    run, task = values.get("run"), values.get("task")
    if run and task:
        problem = f"a job has either run or task, not both; run is at {run.tree.where}"
        raise wrong(task.tree, "task", problem)
    if not run and not task:
        raise wrong(table, "run", "missing; write `run: python train.py`, or `task: vision`")


# ------------------------------------------------------------------------------------------- build


def _build(values: _Values, folder: Path, stem: str, environ: Mapping[str, str]) -> JobSpec:
    plain = {path: found.value for path, found in values.items() if "." not in path}
    plain["name"] = plain.get("name", stem)
    plain["run"] = plain.get("run")
    plain["workdir"] = str(_workdir(values, folder))
    plain["env"] = _environment(values, environ)
    _check_secrets(values, environ)
    _check_command(values, Path(plain["workdir"]))
    resources, training = _section(values, "resources"), _section(values, "training")
    if "memory" in resources:
        resources["memory_bytes"] = resources.pop("memory")
    plain.setdefault("nproc_per_node", max(1, resources.get("gpus", 0)))
    plain["wandb"] = Wandb(**_section(values, "wandb")) if plain.get("wandb") else None
    return JobSpec(
        **plain,
        resources=Resources(**resources),
        training=_options(values, training),
        training_given=tuple(sorted(training)),
        checkpoint=CheckpointPolicy(**_checkpoint(values)),
        retry=RetryPolicy(**_section(values, "retry")),
        watchdog=Watchdog(**_section(values, "watchdog")),
    )


def _section(values: _Values, name: str) -> dict[str, Any]:
    start = f"{name}."
    return {p.removeprefix(start): f.value for p, f in values.items() if p.startswith(start)}


def _options(values: _Values, training: Mapping[str, Any]) -> Options:
    """Options that do not go together are told at the line of the one that is named first."""
    try:
        return Options(**training)
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        raise wrong(values[f"training.{name}"].tree, f"training.{name}", problem) from None


def _checkpoint(values: _Values) -> dict[str, Any]:
    found = _section(values, "checkpoint")
    every = found.get("every")
    if isinstance(every, int):
        found |= {"every": None, "every_steps": every}
    return found


def _workdir(values: _Values, folder: Path) -> Path:
    found = values.get("workdir")
    if found is None:
        return folder
    path = (folder / Path(found.value).expanduser()).resolve()
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "no such folder"
        raise wrong(found.tree, "workdir", f"{path}: {problem}")
    return path


def _environment(values: _Values, environ: Mapping[str, str]) -> dict[str, str]:
    """Empty values are filled from the shell that submits."""
    found: dict[str, Scalar] = values["env"].value if "env" in values else {}
    for name, value in found.items():
        if value.empty and name not in environ:
            problem = "not set in this shell; export it, or give it a value here"
            raise wrong(value, f"env.{name}", problem)
    return {name: environ[name] if v.empty else v.text for name, v in found.items()}


def _check_secrets(values: _Values, environ: Mapping[str, str]) -> None:
    found = values.get("secrets")
    for name in found.value if found else ():
        if name not in environ:
            assert found is not None
            raise wrong(found.tree, "secrets", f"{name} is not set in this shell; export it first")


def _check_command(values: _Values, workdir: Path) -> None:
    found = values.get("run")
    if found is None:
        return
    problem = commandline.problem_of(found.value, workdir, prepared="setup" in values)
    if problem:
        raise wrong(found.tree, "run", problem)


# ------------------------------------------------------------------------------------------- write


def as_fields(spec: JobSpec) -> dict[str, Any]:
    """The spec as a job file would write it, every default filled in; parsing it gives it back."""
    everything: dict[str, Any] = {
        "name": spec.name,
        "nodes": str(spec.nodes),
        "nproc_per_node": spec.nproc_per_node,
        "resources": _resources_fields(spec.resources),
        "workdir": spec.workdir,
        "setup": spec.setup,
        "run": spec.run,
        "task": spec.task,
        "args": dict(spec.args),
        "env": dict(spec.env),
        "secrets": list(spec.secrets),
        "data": dict(spec.data),
        "launcher": str(spec.launcher),
        "training": {name: _plain(value) for name, value in spec.options.items()},
        "checkpoint": _checkpoint_fields(spec.checkpoint),
        "retry": _retry_fields(spec.retry),
        "watchdog": _drop_empty(
            start_within=_duration(spec.watchdog.start_within),
            no_step_for=_duration(spec.watchdog.no_step_for),
        ),
        "max_duration": _duration(spec.max_duration),
        "stop_grace": _duration(spec.stop_grace),
        "priority": spec.priority,
        "tags": dict(spec.tags),
        "wandb": None if spec.wandb is None else _wandb_fields(spec.wandb),
        "tensorboard": spec.tensorboard,
    }
    return _drop_empty(**everything)


def _drop_empty(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, {}, [], ())}


def _duration(value: timedelta | None) -> str | None:
    return None if value is None else write_duration(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, StrEnum) else value


def _wandb_fields(wandb: Wandb) -> dict[str, Any]:
    found = dataclasses.asdict(wandb)
    return _drop_empty(**{name: _plain(value) for name, value in found.items()})


def _resources_fields(resources: Resources) -> dict[str, Any]:
    memory = resources.memory_bytes
    size = None if memory is None else write_size(memory)
    return _drop_empty(gpus=resources.gpus, cpus=resources.cpus, memory=size)


def _checkpoint_fields(policy: CheckpointPolicy) -> dict[str, Any]:
    every = f"{policy.every_steps} steps" if policy.every_steps else _duration(policy.every)
    return _drop_empty(every=every or "never", keep=policy.keep, keep_best=policy.keep_best)


def _retry_fields(policy: RetryPolicy) -> dict[str, Any]:
    preemption = "unlimited" if policy.on_preemption is None else policy.on_preemption
    return {
        "on_errors": policy.on_errors,
        "on_preemption": preemption,
        "on_hang": policy.on_hang,
    }
