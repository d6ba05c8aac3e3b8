"""The built-in trainer: ``python -m dtp_trainer.train vision --epochs 60``, by dtp or alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dtp_trainer.session import Session
from dtp_trainer.session.stop import SessionError
from dtp_trainer.session.telemetry import say
from dtp_trainer.tasks.evaluation import Patience
from dtp_trainer.tasks.gpt import Size
from dtp_trainer.tasks.language import Language
from dtp_trainer.tasks.schedules import Schedule, factor
from dtp_trainer.tasks.vision import Vision


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    task = task_of(args)
    total = args.steps or args.epochs * (len(task.train) // args.global_batch)
    model = task.model()
    optimizer = AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    rise_and_fall = factor(Schedule(args.schedule), warmup=args.warmup, total=total)
    scheduler = LambdaLR(optimizer, rise_and_fall)
    patience = Patience(args.patience)

    with Session(
        model=model, optimizer=optimizer, scheduler=scheduler, state={"patience": patience}
    ) as session:
        ddp = session.ddp(model)
        session.flops(per_sample=task.flops)
        tokens = args.global_batch * task.tokens_per_sample or None
        for batch in session.batches(
            task.train, global_batch=args.global_batch, steps=total, seed=args.seed
        ):
            if patience.lost:
                break
            loss = session.optimize(lambda part: task.loss(ddp, part), batch)
            if session.every(args.eval_every):
                found = task.evaluate(ddp, session)
                patience.saw(found["test_loss"])
                session.log(**found)
            session.step(loss=loss, tokens=tokens)
        if patience.lost and session.rank == 0:
            say(f"no gain in {args.patience} evaluations: ended after {session.global_step} steps")


def task_of(args: argparse.Namespace) -> Vision | Language:
    """Raises: `SessionError`, in one line."""
    if args.task == "vision":
        return Vision(model=args.model, data=args.data)
    try:
        size = Size(args.layers, args.width, args.heads, args.context)
    except ValueError as error:
        raise SessionError(str(error)) from None
    return Language(size)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options by task, each with the task's default; ``--global_batch`` is ``--global-batch``."""
    parser = argparse.ArgumentParser(prog="python -m dtp_trainer.train", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="vision|language")
    vision = _options(tasks, "vision", epochs=60, global_batch=48, lr=2e-3, eval_every=30)
    vision.add_argument("--model", choices=("cnn", "resnet"), default="cnn", help="what learns")
    vision.add_argument("--data", choices=("digits", "mnist"), default="digits", help="images")
    language = _options(tasks, "language", epochs=1, global_batch=24, lr=2e-3, eval_every=100)
    plain = Size()
    language.add_argument("--layers", type=_positive, default=plain.layers, help="of the GPT")
    language.add_argument("--width", type=_positive, default=plain.width, help="of a layer")
    language.add_argument("--heads", type=_positive, default=plain.heads, help="of attention")
    language.add_argument("--context", type=_positive, default=plain.context, help="bytes")
    return parser.parse_args([_dashed(word) for word in argv])


def _options(
    tasks: argparse._SubParsersAction[argparse.ArgumentParser], name: str, **defaults: float
) -> argparse.ArgumentParser:
    parser = tasks.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=_positive, default=defaults["epochs"], help="where training ends")
    add("--steps", type=_positive, help="end after so many steps instead")
    add("--patience", type=_positive, help="end after so many evaluations without gain")
    add("--global-batch", type=_positive, default=defaults["global_batch"], help="samples a step")
    add("--lr", type=float, default=defaults["lr"], help="highest learning rate")
    add("--schedule", choices=list(Schedule), default=Schedule.COSINE, help="of the learning rate")
    add("--warmup", type=int, default=50, help="steps until the highest learning rate")
    add("--weight-decay", type=float, default=0.05, help="of AdamW")
    add("--eval-every", type=_positive, default=defaults["eval_every"], help="steps")
    add("--seed", type=int, default=0, help="of the weights and of the order of samples")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _dashed(word: str) -> str:
    option, given, value = word.partition("=")
    return option.replace("_", "-") + given + value if option.startswith("--") else word


if __name__ == "__main__":
    main(sys.argv[1:])
