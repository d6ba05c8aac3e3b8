"""The built-in trainer: ``python -m dtp_trainer.train vision --epochs 60``, by dtp or alone."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dtp_trainer.session import Session
from dtp_trainer.tasks.language import Language
from dtp_trainer.tasks.vision import Vision


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    task = Vision() if args.task == "vision" else Language()
    total = args.steps or args.epochs * (len(task.train) // args.global_batch)
    model = task.model()
    optimizer = AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = LambdaLR(optimizer, lambda step: warm_cosine(step, args.warmup, total))

    with Session(model=model, optimizer=optimizer, scheduler=scheduler) as session:
        parallel = session.ddp(model)
        for batch in session.batches(
            task.train, global_batch=args.global_batch, steps=total, seed=args.seed
        ):
            rate = scheduler.get_last_lr()[0]
            loss = task.loss(parallel, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()

            if session.every(args.eval_every):
                with session.evaluating():
                    model.eval()
                    session.log(**task.evaluate(model, session))
                    model.train()
            tokens = args.global_batch * task.tokens_per_sample
            session.step(loss=loss, lr=rate, tokens=tokens or None)


def warm_cosine(step: int, warmup: int, total: int) -> float:
    """The learning rate's factor: up in a line, down to a tenth along a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(1, total - warmup), 1.0)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options by task, each with the task's default; ``--global_batch`` is ``--global-batch``."""
    parser = argparse.ArgumentParser(prog="python -m dtp_trainer.train", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="vision|language")
    _options(tasks, "vision", epochs=60, global_batch=48, lr=2e-3, eval_every=30)
    _options(tasks, "language", epochs=1, global_batch=24, lr=2e-3, eval_every=100)
    return parser.parse_args([_dashed(word) for word in argv])


def _options(
    tasks: argparse._SubParsersAction[argparse.ArgumentParser], name: str, **defaults: float
) -> None:
    parser = tasks.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=_positive, default=defaults["epochs"], help="where training ends")
    add("--steps", type=_positive, help="end after so many steps instead")
    add("--global-batch", type=_positive, default=defaults["global_batch"], help="samples a step")
    add("--lr", type=float, default=defaults["lr"], help="highest learning rate")
    add("--weight-decay", type=float, default=0.05, help="of AdamW")
    add("--warmup", type=int, default=50, help="steps until the highest learning rate")
    add("--eval-every", type=_positive, default=defaults["eval_every"], help="steps")
    add("--seed", type=int, default=0, help="of the weights and of the order of samples")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _dashed(word: str) -> str:
    option, given, value = word.partition("=")
    return option.replace("_", "-") + given + value if option.startswith("--") else word


if __name__ == "__main__":
    main(sys.argv[1:])
