"""What a worker is told to run, decided from the job's spec alone."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from dtp_engine.backend import LaunchPlan
from dtp_engine.jobs import (
    AttemptId,
    CheckpointPolicy,
    JobSpec,
    Launcher,
    NodeRange,
    Resources,
    RetryPolicy,
    Wandb,
    Watchdog,
)
from dtp_engine.launches import Place, command_of, launch_of
from dtp_trainer import wire
from dtp_trainer.options import Options, Precision

PLACE = Place(2, "file:///s/", "/scratch", "127.0.0.1", "/z", 60.0, {"TOKEN": "t"})


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("python train.py", ("python", "train.py")),
        ("  python3 -u train.py --lr 0.1\n", ("python3", "-u", "train.py", "--lr", "0.1")),
        ("python train.py --name 'two words'", ("python", "train.py", "--name", "two words")),
        ("python -m pkg.train data.path=/d", ("python", "-m", "pkg.train", "data.path=/d")),
        ("./run.sh", ("./run.sh",)),
    ],
)
def test_plain_line_needs_no_shell(run: str, words: tuple[str, ...]) -> None:
    """A line that bash would only split is split here, so that a warm process can run it."""
    assert command_of(JobSpec("a", run)) == words


@pytest.mark.parametrize(
    "run",
    [
        "cd src && python train.py",
        "python train.py | tee log",
        "python train.py --out $HOME/x",
        "python train.py ~/data",
        "python train.py data/*.bin",
        "LR=1 python train.py",
        "python train.py # twice",
        "set -e\npython a.py\npython b.py",
        "source run.sh",
        'python -c "print(1)"',
        "python train.py 'unbalanced",
        "python back\\slash.py",
    ],
)
def test_line_for_a_shell_goes_to_bash_as_it_stands(run: str) -> None:
    """Whatever bash would do more than splitting is left to bash."""
    assert command_of(JobSpec("a", run)) == ("bash", "-c", run)


def test_args_are_appended_as_options() -> None:
    """`args` follow the line, in their order; in a shell they are quoted, and a value that looks
    like an option is joined to its name."""
    args = {"epochs": "3", "note": "it's", "shift": "-1"}
    plain, shell = (JobSpec("a", run, args=args) for run in ("python a.py", "cd b; python a.py"))
    options = ("--epochs", "3", "--note", "it's", "--shift=-1")
    assert command_of(plain) == ("python", "a.py", *options)
    assert command_of(shell)[2] == "cd b; python a.py --epochs 3 --note 'it'\"'\"'s' --shift=-1"


def test_task_is_the_built_in_trainer() -> None:
    """A task needs no script; its `args` are the trainer's options."""
    spec = JobSpec("a", None, task="vision", args={"epochs": "3"})
    assert command_of(spec) == ("python", "-m", "dtp_trainer.train", "vision", "--epochs", "3")


def test_launch_says_all_that_the_plan_says() -> None:
    """Every field of spec and plan that a worker needs is in its launch, in the wire's units."""
    spec = JobSpec(
        name="digits",
        run="python a.py",
        nodes=NodeRange(1, 4),
        nproc_per_node=2,
        resources=Resources(cpus=8),
        workdir="/w",
        setup="pip install x",
        env={"A": "1", "PYTHONUNBUFFERED": "0"},
        data={"train": "/d"},
        args={"lr": "0.10", "amp": "true"},
        launcher=Launcher.TORCHRUN,
        training=Options(precision=Precision.BF16, prefetch=4),
        wandb=Wandb(project="p", tags=("x",)),
        tensorboard=True,
        checkpoint=CheckpointPolicy(every=timedelta(minutes=1), keep_best="loss"),
        retry=RetryPolicy(),
        watchdog=Watchdog(timedelta(minutes=5), timedelta(minutes=2)),
        stop_grace=timedelta(seconds=45),
    )
    until = datetime(2026, 11, 23, tzinfo=UTC)
    plan = LaunchPlan(
        AttemptId("abc", 3), "digits-2", spec, (2,), 4, "s3cret", 1, 0, train_until=until
    )
    launch = launch_of(plan, PLACE)
    assert (launch.job_id, launch.attempt, launch.worker) == ("abc", 3, 2)
    assert (launch.job_name, launch.secret, launch.workdir) == ("digits-2", "s3cret", "/w")
    assert (launch.workers, launch.min_workers, launch.max_workers) == (4, 1, 4)
    assert (launch.error_budget, launch.hang_budget, launch.nproc_per_node) == (1, 0, 2)
    assert (launch.grace_s, launch.start_within_s, launch.no_step_for_s) == (45.0, 300.0, 120.0)
    assert launch.train_until == until.timestamp()
    assert launch.checkpoint == {
        "every_s": 60.0,
        "every_steps": None,
        "keep": 3,
        "keep_best": "loss",
    }
    assert launch.launcher == "torchrun"
    assert launch.options == {"precision": "bf16", "prefetch": 4}
    assert launch.trackers == {
        "wandb": {"project": "p", "tags": ("x",), "artifacts": "never"},
        "tensorboard": {},
    }
    assert launch.config["name"] == "digits-2"
    assert (launch.config["args.lr"], launch.config["args.amp"]) == (0.1, True)
    assert (launch.config["training.precision"], launch.config["nodes"]) == ("bf16", "1..4")
    assert wire.Launch.from_dict(json.loads(wire.encode_object(launch))).options == launch.options
    assert launch.setup == "pip install x"
    assert launch.data == {"train": "/d"}
    assert launch.env == {
        "A": "1",
        "PYTHONUNBUFFERED": "0",
        "OMP_NUM_THREADS": "4",
        "TOKEN": "t",
    }


def test_ranks_of_a_small_worker_get_one_thread_each() -> None:
    """Less than a core a rank is still one thread."""
    spec = JobSpec("a", "python a.py", nproc_per_node=4, resources=Resources(cpus=1.5))
    plan = LaunchPlan(AttemptId("abc", 1), "a", spec, (0,), 1, "s", 0, 0)
    assert launch_of(plan, PLACE).env["OMP_NUM_THREADS"] == "1"
    twelve = replace(plan, spec=replace(spec, resources=Resources(cpus=12.0)))
    assert launch_of(twelve, PLACE).env["OMP_NUM_THREADS"] == "3"
