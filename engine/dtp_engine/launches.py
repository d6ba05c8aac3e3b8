"""LaunchPlan → what each worker is told (`wire.Launch`); the same for every backend. Pure."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dtp_engine.backend import LaunchPlan
from dtp_engine.jobs import CheckpointPolicy, JobSpec
from dtp_trainer import wire

_SHELL_CHARACTERS = frozenset("|&;<>()$`\\*?[]{}~#!\n")
_SHELL_WORD = re.compile(
    r"[.:\[]|builtin|case|cd|command|eval|exec|export|for|function|if|select|set|source|test|time"
    r"|ulimit|umask|unset|until|while"
)
_ASSIGNMENT = re.compile(r"\w+\+?=.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker lives; what a backend adds to a plan."""

    worker: int
    storage: str
    """URI of ``jobs/<id>/``."""
    scratch: str
    host: str
    zygotes: str
    zygote_idle_s: float
    env: Mapping[str, str]
    """Values of secrets, and the devices the worker may use."""


def launch_of(plan: LaunchPlan, place: Place) -> wire.Launch:
    spec = plan.spec
    return wire.Launch(
        job_id=plan.attempt.job_id,
        job_name=plan.job_name,
        attempt=plan.attempt.number,
        worker=place.worker,
        storage=place.storage,
        secret=plan.secret,
        workdir=spec.workdir,
        scratch=place.scratch,
        command=command_of(spec),
        setup=spec.setup,
        env={**_defaults(spec), **spec.env, **place.env},
        nproc_per_node=spec.nproc_per_node,
        workers=plan.wished,
        min_workers=spec.nodes.min,
        max_workers=spec.nodes.max,
        host=place.host,
        grace_s=spec.stop_grace.total_seconds(),
        error_budget=plan.errors_left,
        hang_budget=plan.hangs_left,
        start_within_s=spec.watchdog.start_within.total_seconds(),
        no_step_for_s=_seconds(spec.watchdog.no_step_for),
        train_until=plan.train_until.timestamp() if plan.train_until else None,
        checkpoint=_checkpoint(spec.checkpoint),
        data=dict(spec.data),
        options=spec.options,
        trackers=trackers_of(spec),
        launcher=spec.launcher,
        config=config_of(spec, plan.job_name),
        zygotes=place.zygotes,
        zygote_idle_s=place.zygote_idle_s,
    )


def command_of(spec: JobSpec) -> tuple[str, ...]:
    """What a rank runs. A bare ``python`` means the interpreter that runs the worker's agent.

    A line that a shell would only split into words is split here and needs no shell between agent
    and rank; any other is given to bash as it stands.

    >>> command_of(JobSpec(name="a", run="python train.py", args={"epochs": "3"}))
    ('python', 'train.py', '--epochs', '3')
    >>> command_of(JobSpec(name="a", run="cd src && python train.py", args={"epochs": "3"}))
    ('bash', '-c', 'cd src && python train.py --epochs 3')
    """
    options = _options(spec.args)
    if spec.task is not None:
        return ("python", "-m", "dtp_trainer.train", spec.task, *options)
    line = (spec.run or "").strip()
    words = _plain_words(line)
    if words is not None:
        return (*words, *options)
    return ("bash", "-c", " ".join((line, *map(shlex.quote, options))))


def _plain_words(line: str) -> tuple[str, ...] | None:
    """None when bash would do more with the line than split it."""
    if _SHELL_CHARACTERS & set(line):
        return None
    try:
        words = tuple(shlex.split(line))
    except ValueError:
        return None
    if not words or _SHELL_WORD.fullmatch(words[0]) or _ASSIGNMENT.fullmatch(words[0]):
        return None
    return words


def _options(args: Mapping[str, str]) -> tuple[str, ...]:
    """A value that begins with a dash is joined, or a parser would take it for an option."""
    options: list[str] = []
    for name, value in args.items():
        options += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    return tuple(options)


def _defaults(spec: JobSpec) -> dict[str, str]:
    """What a job's own `env` may replace: lines appear when they are printed, the ranks of a
    worker share its cores, and the built-in tasks ignore modules that lie in the working folder."""
    threads = max(1, int(spec.resources.cpus / spec.nproc_per_node))
    defaults = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}
    return defaults | ({"PYTHONSAFEPATH": "1"} if spec.task else {})


def trackers_of(spec: JobSpec) -> dict[str, dict[str, Any]]:
    """Tracker → its options, without those that nobody set."""
    found: dict[str, dict[str, Any]] = {}
    if spec.wandb is not None:
        options = dataclasses.asdict(spec.wandb)
        found["wandb"] = {name: value for name, value in options.items() if value}
    if spec.tensorboard:
        found["tensorboard"] = {}
    return found


def config_of(spec: JobSpec, job_name: str) -> dict[str, Any]:
    """The job as a flat mapping, for people who compare jobs; numbers are numbers.

    >>> config_of(JobSpec("a", "python a.py", args={"lr": "0.10"}), "a-2")["args.lr"]
    0.1
    """
    what = {"task": spec.task} if spec.task else {"run": spec.run}
    groups = {"args": spec.args, "data": spec.data, "tags": spec.tags}
    return {
        "name": job_name,
        **what,
        **{f"{g}.{k}": _typed(text) for g, named in groups.items() for k, text in named.items()},
        **{f"training.{k}": v for k, v in dataclasses.asdict(spec.training).items()},
        "nodes": str(spec.nodes),
        "nproc_per_node": spec.nproc_per_node,
        "launcher": spec.launcher,
        **{f"resources.{k}": v for k, v in dataclasses.asdict(spec.resources).items()},
    }


def _typed(text: str) -> str | int | float | bool:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _checkpoint(policy: CheckpointPolicy) -> dict[str, Any]:
    return {
        "every_s": _seconds(policy.every),
        "every_steps": policy.every_steps,
        "keep": policy.keep,
        "keep_best": policy.keep_best,
    }


def _seconds(duration: timedelta | None) -> float | None:
    return None if duration is None else duration.total_seconds()
