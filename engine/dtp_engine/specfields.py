"""The one table of a job file's fields: parser, JSON schema and reference are made from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtp_engine.fieldkinds import (
    COMMAND,
    CPUS,
    DURATION,
    EVERY,
    LABELS,
    NAME,
    NAMES,
    NODES,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    VARIABLES,
    Field,
    Section,
    choice,
    number,
    unlimited,
    whole,
)
from dtp_engine.jobs import Artifacts, Launcher
from dtp_trainer.options import CommHook, Compile, NonFinite, Precision, Shard

TASKS = ("vision", "language")

_TRAINING = (
    Field(
        "precision",
        choice("fp32, bf16 or fp16", tuple(Precision)),
        "What forward and backward compute in: bf16 is the fast one on GPUs since Ampere, fp16 "
        "(with gradient scaling) on older ones. Needs `session.optimize`.",
        "fp32",
    ),
    Field(
        "compile",
        choice(
            "true, false, reduce-overhead or max-autotune",
            tuple(Compile),
            true=Compile.DEFAULT,
            false=Compile.OFF,
        ),
        "`torch.compile`: faster steps after a first one that takes a minute; for models of fixed "
        "shapes.",
        "false",
    ),
    Field(
        "accumulate",
        whole("a number of parts", least=1, most=100_000),
        "Parts in which a rank computes its share of a batch: less memory, the same gradients. "
        "Needs `session.optimize`.",
        "1",
    ),
    Field(
        "clip_grad_norm",
        number("a number", above=0, most=1e12),
        "Gradients with a larger 2-norm are scaled down to it: for training that spikes. Needs "
        "`session.optimize`.",
    ),
    Field(
        "bucket_mb",
        number("a number of MiB", above=0, most=65_536),
        "Gradients travel in buckets of this size: larger ones for a network with a long delay, "
        "smaller ones to begin earlier.",
        "25, as torch has it",
    ),
    Field(
        "static_graph",
        SWITCH,
        "A promise that every step uses the same parameters in the same order: less bookkeeping "
        "for DDP.",
        "false",
    ),
    Field(
        "gradient_as_bucket_view",
        SWITCH,
        "Gradients live in the buckets: saves their size in memory and one copy a step.",
        "false",
    ),
    Field(
        "comm_hook",
        choice("off, fp16, bf16 or powersgd", tuple(CommHook), false=CommHook.OFF),
        "Gradients travel in half the bytes, or as low-rank factors (`powersgd`): for a job that "
        "is comm-bound.",
        "off",
    ),
    Field(
        "powersgd_rank",
        whole("a number", least=1, most=1024),
        "Rank of PowerSGD's factors: higher is closer to the plain gradient and more to send.",
        "1",
    ),
    Field(
        "shard",
        choice("nothing, optimizer or everything", tuple(Shard), false=Shard.NOTHING),
        "What a rank keeps only its part of: `optimizer` (ZeRO-1) when the optimizer's state is "
        "what fills memory, `everything` (FSDP2) when the model does.",
        "nothing",
    ),
    Field(
        "fused_optimizer",
        SWITCH,
        "torch's fused kernels for Adam, AdamW and SGD: a shorter optimizer phase when "
        "there are many parameters.",
        "false",
    ),
    Field(
        "activation_checkpointing",
        SWITCH,
        "Repeated blocks compute their activations again in backward: much less memory for about a "
        "third more compute.",
        "false",
    ),
    Field(
        "channels_last",
        SWITCH,
        "Memory format of convolution networks: faster convolutions, on GPUs with bf16 or fp16 "
        "most of all.",
        "false",
    ),
    Field(
        "prefetch",
        whole("a number of batches", least=0, most=1024),
        "Batches fetched, and moved to the device, ahead of the step; 0 for a dataset that draws "
        "from the global random generators.",
        "2",
    ),
    Field(
        "non_finite",
        choice("ignore, stop, skip or rollback", tuple(NonFinite)),
        "What a NaN or infinite loss or gradient does: `stop` the job, `skip` the update, or "
        "`rollback` to the newest checkpoint. Needs `session.optimize`.",
        "ignore",
    ),
)

_WANDB = (
    Field("project", TEXT, "Of W&B.", "W&B's own: `WANDB_PROJECT`, or `uncategorized`"),
    Field("entity", TEXT, "User or team.", "W&B's own: `WANDB_ENTITY`, or the key's"),
    Field("name", TEXT, "Of the run.", "the job's name"),
    Field("group", TEXT, "Runs shown together."),
    Field("tags", LABELS, "Of the run."),
    Field(
        "artifacts",
        choice("never, best or all", tuple(Artifacts), false=Artifacts.NEVER),
        "Which checkpoints become artifacts.",
        "never",
    ),
)


FIELDS: tuple[Field | Section, ...] = (
    Field("name", NAME, "How commands call the job.", "the file's name"),
    Field(
        "nodes",
        NODES,
        "How many workers: `2` is exactly two; `1..4` is elastic, wishes four, starts with what "
        "fits, and may be scaled while it runs.",
        "1",
    ),
    Field(
        "nproc_per_node",
        whole("a number of ranks", least=1, most=256),
        "Ranks (processes) of one worker.",
        "`resources.gpus`, at least 1",
    ),
    Section(
        "resources",
        "What one worker needs; a job waits in QUEUED until it fits.",
        (
            Field("gpus", whole("a number of GPUs", least=0, most=64), "GPUs.", "0"),
            Field("cpus", CPUS, "CPU cores; a fraction is fine.", "1"),
            Field("memory", SIZE, "Memory, such as 16GB (10⁹) or 16GiB (2³⁰).", "not reserved"),
        ),
    ),
    Field(
        "workdir",
        TEXT,
        "Where the ranks run; a relative path begins at the job file.",
        "the file's folder",
    ),
    Field("setup", COMMAND, "A shell line that each worker runs once before its ranks start."),
    Field(
        "run",
        COMMAND,
        "What every rank runs, such as `python train.py --epochs 3`; dtp is the launcher, so no "
        "torchrun.",
    ),
    Field("task", choice("vision or language", TASKS), "A built-in trainer instead of `run`."),
    Field("args", TEXTS, "Options of the task, or appended to `run` as `--name value`."),
    Field(
        "env",
        VARIABLES,
        "Environment of the ranks; an empty value is taken from the shell that submits, and "
        "refused when it is not set there.",
    ),
    Field(
        "secrets",
        NAMES,
        "Variables taken from the shell that submits; their values are never shown.",
    ),
    Field("data", TEXTS, "Names and locations of data, handed to the ranks as `DTP_DATA`."),
    Field(
        "launcher",
        choice("dtp or torchrun", tuple(Launcher)),
        "Who starts the ranks of a worker; `torchrun` for what depends on its rendezvous, with its "
        "slower recovery.",
        "dtp",
    ),
    Section(
        "training",
        "How a step is computed, for scripts that use `Session`, and for tasks.",
        _TRAINING,
    ),
    Section(
        "checkpoint",
        "For scripts that use `Session`, and for tasks.",
        (
            Field("every", EVERY, "A duration, `500 steps`, or `never`.", "10m"),
            Field("keep", whole("a number", least=1, most=10_000), "How many are kept.", "3"),
            Field(
                "keep_best",
                TEXT,
                "A reported value; the checkpoint with the best one is kept too. Names that hold "
                "`loss` or `error` are better when smaller.",
            ),
        ),
    ),
    Section(
        "retry",
        "Separate budgets for what can go wrong.",
        (
            Field("on_errors", whole("a number", least=0, most=1000), "The script failed.", "3"),
            Field(
                "on_preemption",
                unlimited("a number, or unlimited", most=10_000),
                "The machine was taken away.",
                "unlimited",
            ),
            Field("on_hang", whole("a number", least=0, most=1000), "No step for too long.", "2"),
        ),
    ),
    Section(
        "watchdog",
        "When a job counts as stuck.",
        (
            Field(
                "start_within",
                DURATION,
                "From launch to the first step; scripts without `Session` are not watched for it.",
                "15m",
            ),
            Field("no_step_for", DURATION, "Between two steps; then the hanging rank is named."),
        ),
    ),
    Field("max_duration", DURATION, "Time in RUNNING after which the job stops with a checkpoint."),
    Field("stop_grace", DURATION, "From SIGTERM to SIGKILL, the last checkpoint included.", "30s"),
    Field(
        "priority", whole("a number", least=0, most=100), "Higher is placed first, 0 to 100.", "50"
    ),
    Field("tags", TEXTS, "Free names and values, for your own order."),
    Section(
        "wandb",
        "Metrics go to Weights & Biases too, under one run for all attempts; `wandb: true` is "
        "enough. Without a key the run is kept offline.",
        _WANDB,
        switch=True,
    ),
    Field("tensorboard", SWITCH, "Metrics go to event files in the job's storage too.", "false"),
)

SYNONYMS: Mapping[str, str] = {
    "accelerators": "resources.gpus",
    "accumulate_grad_batches": "training.accumulate",
    "amp": "training.precision",
    "bucket_cap_mb": "training.bucket_mb",
    "checkpoints": "checkpoint",
    "command": "run",
    "commands": "run",
    "cpu": "resources.cpus",
    "cwd": "workdir",
    "entrypoint": "run",
    "dtype": "training.precision",
    "environment": "env",
    "envs": "env",
    "fsdp": "training.shard",
    "gpu": "resources.gpus",
    "grad_clip": "training.clip_grad_norm",
    "gradient_accumulation_steps": "training.accumulate",
    "gradient_checkpointing": "training.activation_checkpointing",
    "gradient_clip_val": "training.clip_grad_norm",
    "labels": "tags",
    "max_grad_norm": "training.clip_grad_norm",
    "max_restarts": "retry.on_errors",
    "max_retries": "retry.on_errors",
    "mem": "resources.memory",
    "mixed_precision": "training.precision",
    "nnodes": "nodes",
    "num_nodes": "nodes",
    "script": "run",
    "strategy": "training.shard",
    "timeout": "max_duration",
    "workers": "nodes",
    "working_dir": "workdir",
    "zero": "training.shard",
}
"""What other launchers call it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One field, flat, for reference tables."""

    path: str
    """``checkpoint.every``."""
    words: str
    default: str
    help: str
    schema: Mapping[str, Any] = field(default_factory=dict)


def walk() -> Iterator[Reference]:
    """Every field in the order of the reference; sections are named by their fields' paths."""
    for item in FIELDS:
        if isinstance(item, Field):
            yield Reference(item.name, item.kind.words, item.default, item.help, item.kind.schema)
            continue
        for inner in item.fields:
            path = f"{item.name}.{inner.name}"
            yield Reference(path, inner.kind.words, inner.default, inner.help, inner.kind.schema)


def json_schema() -> dict[str, Any]:
    """For editors: JSON Schema (draft 2020-12) of a job file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dtp job",
        "type": "object",
        "properties": {item.name: _schema_of(item) for item in FIELDS},
        "oneOf": [{"required": ["run"]}, {"required": ["task"]}],
        "additionalProperties": False,
    }


def _schema_of(item: Field | Section) -> dict[str, Any]:
    if isinstance(item, Field):
        default = f" Default: {item.default}." if item.default else ""
        return {"description": item.help + default, **item.kind.schema}
    fields = {
        "type": "object",
        "properties": {inner.name: _schema_of(inner) for inner in item.fields},
        "additionalProperties": False,
    }
    if item.switch:
        return {"description": item.help, "oneOf": [fields, {"type": "boolean"}]}
    return {"description": item.help, **fields}
