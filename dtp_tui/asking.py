"""Ask, then do: from a chosen verb to the engine and back to one line that says what came of it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, assert_never

from dtp_engine.engine import Engine
from dtp_engine.errors import DtpError
from dtp_engine.jobs import Job
from dtp_engine.views import JobView
from dtp_tui import consequences, labels
from dtp_tui.labels import Tone
from dtp_tui.messages import Verb, Wish
from dtp_tui.screens.confirm import ConfirmDialog
from dtp_tui.screens.resume import ResumeDialog
from dtp_tui.screens.scale import ScaleDialog

if TYPE_CHECKING:
    from textual.app import App


async def ask(
    app: App[None], engine: Engine, verb: Verb, view: JobView, now: datetime
) -> Wish | None:
    """Must run in a worker of the app. None when the operator thought better of it."""
    job = view.job
    match verb:
        case Verb.PAUSE | Verb.STOP:
            dialog = ConfirmDialog(consequences.of(verb, view, now))
            agreed = await app.push_screen_wait(dialog)
            return Wish(verb, job.id, job.name) if agreed else None
        case Verb.SCALE:
            workers = await app.push_screen_wait(ScaleDialog(view))
            return None if workers is None else Wish(verb, job.id, job.name, workers=workers)
        case Verb.RESUME:
            return await _ask_resume(app, engine, view, now)
        case _:
            assert_never(verb)


async def _ask_resume(app: App[None], engine: Engine, view: JobView, now: datetime) -> Wish | None:
    wish = Wish(Verb.RESUME, view.job.id, view.job.name)
    entries = await engine.checkpoints(view.job.id)
    if not entries:
        agreed = await app.push_screen_wait(
            ConfirmDialog(consequences.resume(view, None, None, now))
        )
        return wish if agreed else None
    chosen = await app.push_screen_wait(ResumeDialog(view, entries, now))
    if chosen is None:
        return None
    return Wish(Verb.RESUME, view.job.id, view.job.name, from_step=chosen.step)


async def perform(engine: Engine, wish: Wish) -> tuple[str, Tone]:
    """What came of it in one line; a refusal is an answer, not an error."""
    try:
        job = await _perform(engine, wish)
    except DtpError as error:
        return str(error), Tone.BAD
    words = labels.headline(job).word
    match wish.verb:
        case Verb.SCALE:
            return f"{job.name}: {labels.plural(job.workers, 'worker')} wished", Tone.GOOD
        case _:
            return f"{job.name}: {words}", Tone.GOOD


async def _perform(engine: Engine, wish: Wish) -> Job:
    match wish.verb:
        case Verb.PAUSE:
            return await engine.pause(wish.job_id)
        case Verb.RESUME:
            return await engine.resume(wish.job_id, from_step=wish.from_step)
        case Verb.SCALE:
            return await engine.scale(wish.job_id, wish.workers or 1)
        case Verb.STOP:
            return await engine.stop(wish.job_id)
        case _:
            assert_never(wish.verb)
