"""The first tab of a job: where it stands, four charts, and what happened last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical

from dtp_engine.jobs import Job
from dtp_engine.series import MetricHistory
from dtp_trainer import wire
from dtp_tui import labels
from dtp_tui.cleaning import harmless
from dtp_tui.labels import Tone
from dtp_tui.messages import JobPicture
from dtp_tui.widgets.chart import Chart
from dtp_tui.widgets.events_feed import event_tone
from dtp_tui.widgets.job_plots import Past, plots
from dtp_tui.widgets.jobs_table import why_tone
from dtp_tui.widgets.lines import Lines
from dtp_tui.widgets.spans import Line, Span, joined, label_span

LAST_EVENTS = 6
_BAR = 20


class Overview(Vertical, can_focus=True):
    """Shows a `JobPicture`; `past` is what its charts show."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t", "turn", "Axis", tooltip="charts by time, or by step"),
        Binding(
            "plus,equals_sign",
            "closer",
            "Closer",
            key_display="+",
            tooltip="charts of a shorter past",
            show=False,
        ),
        Binding(
            "minus",
            "wider",
            "Wider",
            key_display="-",
            tooltip="charts of a longer past",
            show=False,
        ),
    ]

    DEFAULT_CSS = """
    Overview > #stats { height: 3; }
    Overview > Grid { grid-size: 2 2; height: 1fr; grid-gutter: 0 1; }
    Overview > #last-events { height: 6; margin-top: 1; display: none; }
    """

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(id=id)
        self.past = Past()
        self._picture: JobPicture | None = None

    def compose(self) -> ComposeResult:
        yield Lines(id="stats")
        with Grid():
            yield Chart("Loss", id="loss")
            yield Chart("Throughput", id="throughput")
            yield Chart("Resources", id="resources")
            yield Chart("Step time", id="step-time")
        yield Lines(id="last-events")

    def show_job(self, picture: JobPicture) -> None:
        self._picture = picture
        above = self.query_one("#stats", Lines)
        lines = stats(picture, self.past)
        above.styles.height = len(lines)
        above.show(lines)
        self.query_one("#last-events", Lines).show(last_events(picture))
        for name, plot in plots(picture, self.past).items():
            self.query_one(f"#{name}", Chart).show(plot)

    def set_past(self, wanted: Past) -> None:
        self.past = wanted
        if self._picture is not None:
            self.show_job(self._picture)

    def action_turn(self) -> None:
        self.set_past(self.past.turned())

    def action_closer(self) -> None:
        self.set_past(self.past.closer())

    def action_wider(self) -> None:
        self.set_past(self.past.wider())


def stats(picture: JobPicture, shown: Past) -> tuple[Line, ...]:
    """State and progress; the gang; the newest values; once it is known, where steps take their
    time."""
    job, gang = picture.view.job, picture.view.gang
    state = label_span(labels.headline(job, gang))
    first = joined([(Span(state.text, state.tone, strong=True),), _progress(picture), _why(job)])
    second = joined(_gang_groups(picture))
    chart_range = (Span(f"charts: {shown} ", Tone.QUIET),)
    return (
        Line((Span(" "), *first)),
        Line((Span(" "), *second)),
        Line((Span(" "), *joined(_value_groups(picture.history))), chart_range),
        *_step_time(gang),
    )


def _why(job: Job) -> tuple[Span, ...]:
    why = labels.why(job)
    return (Span(why, why_tone(job)),) if why else ()


def _progress(picture: JobPicture) -> tuple[Span, ...]:
    gang = picture.view.gang
    if gang is None or gang.step is None:
        return (Span("no step yet", Tone.QUIET),)
    spans = [Span("step "), Span(labels.step(gang.step, gang.total_steps), strong=True)]
    if gang.total_steps:
        share = min(1.0, gang.step / gang.total_steps)
        done = round(share * _BAR)
        spans += [
            Span("  " + "━" * done, Tone.GOOD),
            Span("─" * (_BAR - done), Tone.QUIET),
            Span(f"  {share:.0%}"),
        ]
    left = remaining(picture)
    if left is not None:
        spans += [Span("   left ", Tone.QUIET), Span(labels.duration(left))]
    return tuple(spans)


def remaining(picture: JobPicture) -> float | None:
    """Seconds until the last step at the newest pace; None while nobody can tell."""
    job, gang = picture.view.job, picture.view.gang
    pace = picture.history.last("step_s")
    if gang is None or gang.step is None or not gang.total_steps or not pace or not job.active:
        return None
    return max(0, gang.total_steps - gang.step) * pace


def _gang_groups(picture: JobPicture) -> list[tuple[Span, ...]]:
    job, gang, checkpoint = picture.view.job, picture.view.gang, picture.view.checkpoint
    workers = (Span("workers ", Tone.QUIET), Span(labels.workers(job, gang)))
    groups: list[tuple[Span, ...]] = [workers]
    if gang is not None:
        groups.append((Span("generation ", Tone.QUIET), Span(str(gang.generation))))
    if job.attempt > 1:
        groups.append((Span("attempt ", Tone.QUIET), Span(str(job.attempt))))
    if gang is not None and gang.restarts:
        groups.append((Span("restarts ", Tone.QUIET), Span(str(gang.restarts), Tone.WARN)))
    if picture.view.checkpoint_problem:
        groups.append((Span("checkpoints ", Tone.QUIET), Span("damaged", Tone.BAD)))
    elif checkpoint is None:
        groups.append((Span("no checkpoint", Tone.QUIET),))
    else:
        saved = f"step {checkpoint.step:,}, {labels.age(checkpoint.at, picture.now)} ago"
        groups.append((Span("checkpoint ", Tone.QUIET), Span(saved)))
    groups.append((Span("ran ", Tone.QUIET), Span(labels.elapsed(job, picture.now))))
    return groups


def _step_time(gang: wire.Gang | None) -> Iterator[Line]:
    """One line, or none while nobody knows."""
    if gang is None or gang.step_s is None:
        return
    spans = [Span(" step ", Tone.QUIET), Span(f"{labels.seconds(gang.step_s)}:")]
    for phase in labels.phases(gang.phases):
        name, _, share = phase.rpartition(" ")
        spans += [Span(f" {name} ", Tone.QUIET), Span(share)]
    tone = Tone.GOOD if gang.verdict == "compute" else Tone.WARN
    yield Line(tuple(spans), (Span(f"{gang.verdict} ", tone),))


def _value_groups(history: MetricHistory) -> list[tuple[Span, ...]]:
    """What the script reports, apart from what the charts' titles say already."""
    derived = {"samples_per_s", "tokens_per_s", "data_wait"}
    names = [n for n in history.names() if n not in derived and not n.endswith("_s")]
    return [
        (Span(f"{name} ", Tone.QUIET), Span(labels.value(history.last(name), name)))
        for name in names[:6]
    ]


def last_events(picture: JobPicture) -> list[Line]:
    """The newest first."""
    return [
        Line(
            (
                Span(f" {labels.clock(event.at)}  ", Tone.QUIET),
                Span(f"{event.name.replace('_', ' '):<19} ", event_tone(event.name)),
                Span(harmless(event.text)),
            ),
            (Span(f"{event.actor} ", Tone.QUIET),),
        )
        for event in reversed(picture.events[-LAST_EVENTS:])
    ]
