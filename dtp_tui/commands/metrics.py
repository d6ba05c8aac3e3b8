"""`dtp metrics JOB`: what the job has reported and what its workers use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from dtp_tui.commands.options import JobArgument, JsonOption

if TYPE_CHECKING:
    from dtp_engine.engine import Engine
    from dtp_engine.series import MetricHistory, Series
    from dtp_tui.output import Output
    from dtp_tui.tables import Row

TREND_WIDTH = 16


def command(
    job: JobArgument,
    *,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only this series, such as loss; may be given several times.",
            show_default=False,
        ),
    ] = None,
    json_lines: JsonOption = False,
) -> None:
    """Show loss, throughput, step times, resources.

    Every reported value with its newest, lowest and highest sample, and its trend.

    With --json every sample is a line: name, worker (null for the whole job), at, step, value.
    """
    from dtp_engine.errors import UsageError
    from dtp_tui.client import with_engine
    from dtp_tui.output import Output

    async def read(engine: Engine) -> MetricHistory:
        return await engine.metrics((await engine.find(job)).id)

    series = _chosen(with_engine(read))
    known = {one.name for one in series}
    for wanted in name or ():
        if wanted not in known:
            raise UsageError(f'{job}: no series "{wanted}"; there are: {", ".join(sorted(known))}')
    shown = [one for one in series if not name or one.name in name]
    out = Output(json_lines=json_lines)
    if json_lines:
        for one in shown:
            _emit(out, one)
    elif shown:
        _print(out, shown)
    else:
        out.say(f"{job}: nothing measured yet")


def _chosen(history: MetricHistory) -> list[Series]:
    """Of the whole job, then of each worker."""
    from dtp_engine.series import RESOURCES

    job = [history.series(name) for name in history.names()]
    workers = [
        history.series(name, worker) for name in RESOURCES for worker in history.workers(name)
    ]
    return [one for one in (*job, *workers) if len(one)]


def _emit(out: Output, series: Series) -> None:
    from dtp_tui.records import utc

    for point in series.points():
        out.emit(
            {
                "name": series.name,
                "worker": series.worker,
                "at": utc(point.at),
                "step": point.step if series.worker is None else None,
                "value": point.value,
            }
        )


def _print(out: Output, shown: list[Series]) -> None:
    from dtp_tui.tables import Column

    columns = [
        Column("NAME"),
        Column("WORKER", right=True, drop=3),
        Column("LAST", right=True),
        Column("MIN", right=True, drop=1),
        Column("MAX", right=True, drop=1),
        Column("SAMPLES", right=True, drop=4),
        Column("TREND", drop=2),
    ]
    out.table(columns, [_row(series) for series in shown])


def _row(series: Series) -> Row:
    from dtp_engine.series import sparkline
    from dtp_tui.labels import UNKNOWN

    values = [point.value for point in series.points()]
    finite = [value for value in values if math.isfinite(value)]
    trend = [bucket.last for bucket in series.view(TREND_WIDTH)]
    return (
        series.name,
        UNKNOWN if series.worker is None else str(series.worker),
        _shown(series.name, values[-1]),
        _shown(series.name, min(finite, default=math.nan)),
        _shown(series.name, max(finite, default=math.nan)),
        str(len(values)),
        sparkline(trend, TREND_WIDTH),
    )


def _shown(name: str, value: float) -> str:
    from dtp_tui import labels

    if name.endswith("_bytes"):
        return labels.size(value)
    if name.endswith("_bytes_per_s"):
        return f"{labels.size(value)}/s"
    if name.endswith(("_watts", "_celsius", "_mhz")):
        unit = {"watts": " W", "celsius": "°C", "mhz": " MHz"}[name.rpartition("_")[2]]
        return labels.UNKNOWN if math.isnan(value) else f"{value:.0f}{unit}"
    if name.endswith("_s") and not name.endswith("_per_s"):
        return labels.UNKNOWN if math.isnan(value) else f"{value * 1000:.3g}ms"
    if name.endswith("_percent"):
        return f"{value:.0f}%"
    if name == "data_wait":
        return labels.percent(value)
    return labels.count(value) if name.endswith("_per_s") else labels.value(value, name)
