"""What the leader says when the gang ends: how it left, what is kept and what is lost. Pure."""

from __future__ import annotations

from dtp_trainer.gang import effort
from dtp_trainer.gang.effort import Loss
from dtp_trainer.gang.state import State


def left_text(state: State) -> str:
    if state.progress.step is None:
        return f"left as asked{_killed_text(state)}, before the first step"
    if not state.chronicle.checkpoint[1]:
        at = f"at step {state.progress.step}"
        return f"left as asked {at}{_killed_text(state)}, without a checkpoint"
    return f"left as asked{_killed_text(state)}; {_saved_text(state)}"


def time_is_up(state: State) -> str:
    where = _saved_text(state) if state.chronicle.checkpoint[1] else "without a checkpoint"
    return f"trained for as long as it may{_killed_text(state)}; {where}"


def _killed_text(state: State) -> str:
    return ", killed after the grace" if state.chronicle.tells_of("grace_over") else ""


def _saved_text(state: State) -> str:
    loss = _unsaved(state)
    if not loss.steps:
        return f"newest checkpoint: step {loss.back_to}"
    amount = effort.amount(loss)
    return f"{amount} since step {loss.back_to} {'is' if loss.steps == 1 else 'are'} lost"


def lost_text(state: State) -> str:
    """After a failure that ends the gang."""
    if not (loss := _unsaved(state)).steps:
        return ""
    if not loss.back_to:
        return f"; no checkpoint holds its {effort.amount(loss)}"
    return f"; {_saved_text(state)}"


def _unsaved(state: State) -> Loss:
    """What lies behind the newest checkpoint."""
    saved, step = state.chronicle.checkpoint[1], state.progress.step or 0
    return Loss(step, saved, state.effort.between(saved, step))


def used_up(budget: int) -> str:
    if budget <= 1:
        return "; the only retry is used" if budget else ""
    return f"; all {budget} retries are used"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
