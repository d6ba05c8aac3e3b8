"""The API for a script of your own: checkpoints, pause, resume, scale and metrics in five lines.

    session = Session(model=model, optimizer=optimizer)
    ddp = session.ddp(model)
    for batch in session.batches(dataset, global_batch=64, epochs=10, seed=0):
        loss = session.optimize(lambda part: loss_of(ddp, part), batch)
        session.step(loss=loss)
    session.finish()

Under plain Python or torchrun it trains the same, keeps nothing and resumes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtp_trainer.options import Options, Precision, of_job
from dtp_trainer.sampler import Lanes, SamplerError
from dtp_trainer.session import course, parallel
from dtp_trainer.session.agreement import Leave
from dtp_trainer.session.distributed import join
from dtp_trainer.session.efficiency import Efficiency
from dtp_trainer.session.feed import Feed
from dtp_trainer.session.guard import Unsound
from dtp_trainer.session.keeper import Kept, open_keeper
from dtp_trainer.session.learner import learner
from dtp_trainer.session.loader import Collate, Dataset
from dtp_trainer.session.phases import Phases
from dtp_trainer.session.profiling import Profiling
from dtp_trainer.session.rehearsal import Rehearsal
from dtp_trainer.session.standing import Standing
from dtp_trainer.session.state import Stateful
from dtp_trainer.session.stop import Paused, SessionError, StopRequest
from dtp_trainer.session.telemetry import Telemetry, Value, say, say_warnings
from dtp_trainer.session.update import LossOf
from dtp_trainer.storage import StorageError
from dtp_trainer.wire import Env, ExitCode

PEERS_WORD_S = 2.0


class Session:
    """One rank's part in a job that may be paused, resumed and scaled at any step.

    Joins the process group when the environment names one, moves the model to its device, and
    loads the newest good checkpoint into what it is given.
    """

    options: Options
    """How a step is computed: the script's choice, overruled by the job file's ``training``."""

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Stateful | None = None,
        state: Mapping[str, Stateful] | None = None,
        options: Options | None = None,
    ) -> None:
        """`state` names further objects with `state_dict` and `load_state_dict`, the same on every
        rank (an average of the weights, say). `scheduler.step` is called by `optimize`. Ends the
        script with one line when the checkpoint does not fit."""
        self.options = _chosen(options)
        self._feed: Feed | None = None
        self._steps_ended = 0
        self._over = False
        self._stop = StopRequest()
        say_warnings()
        _listen(self._stop)
        with _starting(self._stop):
            with self._stop.leaving_at_once():
                self._world = join()
                self._telemetry = Telemetry(self.rank, self.world_size)
                self._profiling, self._rehearsal = Profiling(self.rank), Rehearsal()
                made = learner(
                    model,
                    optimizer,
                    scheduler,
                    state or {},
                    options=self.options,
                    world=self._world,
                    telemetry=self._telemetry,
                )
                self._update, self._compression = made.update, made.compression
                keeper = open_keeper(self._world, self._stop, made.part)
                self._standing = Standing(
                    made.state, self._update.guard, keeper, self._telemetry, self._world
                )
                self._standing.resume()
            self._leave_if_asked()
        self._watch = Phases(self.device)
        self._watch.follow_optimizer(optimizer)
        self._efficiency = Efficiency(self.device, self.world_size, self.options)

    @property
    def global_step(self) -> int:
        """Steps completed since the job began, over all attempts."""
        return self._standing.step

    @property
    def rank(self) -> int:
        return self._world.rank

    @property
    def world_size(self) -> int:
        return self._world.size

    @property
    def device(self) -> torch.device:
        return self._world.device

    @property
    def at_epoch_end(self) -> bool:
        """In the loop's body, before `step`: this batch is the last of its epoch."""
        return self._standing.course.ends_epoch(self.global_step + 1)

    def every(self, steps: int) -> bool:
        """In the loop's body, before `step`: this is an n-th step, or the last one."""
        step = self.global_step + 1
        return step % steps == 0 or self._standing.course.ends(step)

    def ddp(self, model: nn.Module, **options: Any) -> nn.Module:
        """The model for the forward pass: wrapped for gradients to be averaged, or itself when
        there is one rank. `options` are those of `DistributedDataParallel`."""
        forward = parallel.wrapped(model, self._world, self.options, self._compression, **options)
        self._update.forwards_with(forward)
        self._watch.follow_model(forward)
        return forward

    def batches(
        self,
        dataset: Dataset,
        *,
        global_batch: int,
        epochs: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        collate: Collate | None = None,
        ahead: int | None = None,
    ) -> Iterator[Any]:
        """This rank's share of every batch that is left, on its device; call `step` once for each.

        The order depends on the seed alone: at any world size, and after any number of pauses, each
        step has the same global batch. What fills no batch at an epoch's end is left out of it.

        Args:
            global_batch: Samples a step over all ranks; the number of ranks must divide it.
            epochs, steps: Where training ends, counted from the beginning of the job.
            ahead: Batches fetched in advance by a thread, and sent to the device; None: the option
                `prefetch`. 0: a dataset that draws from the global random generators repeats
                exactly only then.
        """
        if self._feed is not None:
            raise RuntimeError("call session.batches() once; it goes through all epochs")
        with _fitting():
            lanes = Lanes(len(dataset), global_batch, seed)
            planned = course.plan(lanes, self.world_size, epochs=epochs, steps=steps)
            self._standing.walk(planned)
        prefetch = self.options.prefetch if ahead is None else ahead
        self._feed = Feed(dataset, planned, self._world, collate=collate, ahead=prefetch)
        self._leave_if_asked()
        self._standing.fed_by(self._feed)
        self._watch.lap()
        with contextlib.closing(self._feed) as feed:
            while self.global_step < planned.total_steps:
                ended = self._steps_ended
                yield feed.after(self.global_step, self._watch)
                if self._steps_ended != ended + 1:
                    raise RuntimeError("call session.step() once for each batch")

    def optimize(self, loss_of: LossOf, batch: Any) -> Tensor:
        """One step of the optimizer, as the options say; this rank's mean loss, detached.

        `loss_of` computes the mean loss of a batch or of a part of one, with the model of `ddp`. It
        is followed by `backward`, `optimizer.step`, `scheduler.step`; gradients are set to None.
        """
        try:
            return self._update.make(self.global_step + 1, loss_of, batch)
        except Unsound as error:
            self._standing.end_together(own=error.own)
            raise
        except SessionError:
            self._standing.last_word()
            raise

    def step(
        self, *, samples: int | None = None, tokens: int | None = None, **values: Value
    ) -> None:
        """The end of a step; call it last in the loop's body, after everything that changes state.

        Reports `values` (loss, lr …), checkpoints when one is due, and leaves when asked to: all
        ranks after the same step. `samples` (default: `global_batch`) and `tokens` are of the
        global batch. Raises `Paused`, which ends the script with 75.
        """
        self._update.check_used()
        self._steps_ended += 1
        if self._update.guard.wants_back and self._go_back():
            return
        self._standing.step += 1
        self._telemetry.sample(values)
        decision = self._standing.decide()
        self._standing.checkpoint(decision, self._watch)
        if self._standing.is_at_first:
            self._world.wait_briefly()
        position = self._standing.position(samples, tokens)
        seconds = self._watch.lap()
        self._telemetry.keep(self._efficiency.ended(position, seconds["step"]))
        self._telemetry.step(position, seconds)
        self._profiling.end_of_step(self.global_step)
        if decision.leave is not Leave.NO:
            self._leave(decision.leave)
        if self._rehearsal.over(position):
            self._end_early(self._rehearsal.summary(position))

    def flops(
        self,
        *,
        per_sample: float | None = None,
        per_token: float | None = None,
        precision: Precision | None = None,
    ) -> None:
        """Report ``tflops`` (a second and device) and, where the GPU's peak is known, ``mfu``.

        Call it once, before the loop, with the operations that the model needs forward and
        backward; for a transformer about 6 times its parameters a token. Without a number those of
        one step are counted, which takes that step several times as long. `precision`: of a script
        that does its own autocast.
        """
        self._efficiency.expect(per_sample, per_token, precision)

    def log(self, **values: Value) -> None:
        """Report with the next step; after the last one, with `finish`."""
        self._telemetry.keep(values)

    def evaluating(self) -> AbstractContextManager[None]:
        """Around an evaluation: its time is reported by itself, not as the step's."""
        return self._watch.evaluating()

    def sum(self, values: Tensor) -> Tensor:
        """Over all ranks, on the CPU; every rank calls it at the same place."""
        return self._world.sum(values)

    def finish(self) -> None:
        """The last checkpoint, the last values, and out of the process group. Twice is once."""
        if not self._over:
            self._end(self._standing.commit())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None:
            self.finish()
        elif not self._over:
            self._telemetry.close()

    def _go_back(self) -> bool:
        with _starting(self._stop):
            went = self._standing.go_back()
        self._watch.lap()
        return went

    def _leave_if_asked(self) -> None:
        """Where no step was taken since the resume point, so there is nothing to keep."""
        leave = self._standing.leave_now()
        if leave is not Leave.NO:
            self._leave(leave)

    def _leave(self, leave: Leave) -> None:
        self._end(self._standing.commit() if leave is Leave.PAUSED else Kept.FENCED)
        raise Paused

    def _end_early(self, why: str) -> None:
        """Well, and with nothing kept."""
        self._standing.settle(why)
        self._end(Kept.YES)
        raise SystemExit(int(ExitCode.SUCCEEDED))

    def _end(self, kept: Kept) -> None:
        """Close all; ends the script when its state could not be kept."""
        self._over = True
        self._standing.stop_feeding()
        self._profiling.close()
        self._telemetry.close()
        if kept is Kept.FENCED:
            raise SystemExit(int(ExitCode.FENCED))
        self._standing.close()
        self._world.leave()
        if kept is Kept.NO:
            raise SessionError(f"what was trained up to step {self.global_step} could not be kept")


def _listen(stop: StopRequest) -> None:
    if os.environ.get(Env.STORAGE) and not stop.listen():
        say("Session was made outside the main thread, so this rank cannot hear a pause")


def _chosen(options: Options | None) -> Options:
    try:
        return of_job(options)
    except ValueError as error:
        raise SessionError(f"training.{error}") from None


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    try:
        yield
    except SamplerError as error:
        raise SessionError(str(error)) from None


@contextlib.contextmanager
def _starting(stop: StopRequest) -> Iterator[None]:
    """Errors of a start in one line. A peer that was asked to leave takes its connections with it;
    then our own word is on its way."""
    try:
        yield
    except (StorageError, ValueError) as error:
        raise SessionError(f"cannot resume: {error}") from None
    except RuntimeError as error:
        if stop.wait(PEERS_WORD_S):
            raise Paused from None
        line = str(error).strip().partition("\n")[0]
        raise SessionError(f"cannot start: {line or type(error).__name__}") from None
