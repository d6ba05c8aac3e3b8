"""What stands in the rows of the tables."""

from __future__ import annotations

from types import SimpleNamespace

from dtp_engine.jobs import Attempt, JobState, Placement, PlacementState, Reason
from dtp_engine.series import MetricHistory
from dtp_tui.labels import Tone
from dtp_tui.widgets.checkpoints_table import checkpoint_row, newest_good
from dtp_tui.widgets.config_table import config_rows
from dtp_tui.widgets.jobs_table import COLUMNS, filtered, in_order, job_row
from dtp_tui.widgets.spans import Line, Span, joined
from dtp_tui.widgets.table import Column, Row, layout
from dtp_tui.widgets.workers_table import worker_rows


def texts(row: Row) -> dict[str, str]:
    columns = (column.title for column in COLUMNS)
    return dict(zip(columns, (cell.text for cell in row.cells), strict=True))


def test_columns_go_by_rank_when_there_is_no_room() -> None:
    """The least important goes first; those of rank 0 always stay."""
    columns = (Column("A", 10), Column("B", 10, rank=1), Column("C", 10, rank=2))
    assert list(layout(columns, 34)) == [0, 1, 2]
    assert list(layout(columns, 33)) == [0, 1]
    assert list(layout(columns, 5)) == [0]


def test_room_that_is_left_is_shared() -> None:
    """Columns grow by their shares, and never beyond the width."""
    columns = (Column("A", 10, grow=1), Column("B", 10), Column("C", 10, grow=3))
    widths = layout(columns, 74)
    assert widths == {0: 20, 1: 10, 2: 40}


def test_the_jobs_table_fits_80_columns() -> None:
    """What matters most is seen on the smallest screen."""
    kept = [COLUMNS[i].title for i in layout(COLUMNS, 78)]
    assert kept == ["NAME", "STATE", "WORKERS", "STEP", "RATE", "TREND", "CKPT"]


def test_a_running_job_in_a_row(given: SimpleNamespace) -> None:
    """State, workers, step, rate with trend, use, memory and age of the newest checkpoint."""
    row = texts(job_row(given.job_view(), given.now))
    assert row["NAME"] == "digits"
    assert row["STATE"] == "● Running"
    assert row["WORKERS"] == "2/2"
    assert row["STEP"] == "1200/5000"
    assert row["RATE"] == "8.20k/s"
    assert len(row["TREND"]) == 4
    assert row["USE"] == "cpu 190%"
    assert row["MEMORY"] == "2.0 GiB"
    assert row["CKPT"] == "30s"


def test_a_failed_job_says_why(given: SimpleNamespace) -> None:
    """The reason is in the row, and no stale number beside it."""
    view = given.job_view(
        "broken", JobState.FAILED, reason=Reason.WORKER_FAILED, detail="ValueError: bad"
    )
    row = texts(job_row(view, given.now))
    assert "ValueError: bad" in row["REASON"]
    assert row["RATE"] == row["USE"] == "—"


def test_what_runs_stands_first(given: SimpleNamespace) -> None:
    """Then what is paused, then what has ended."""
    views = [
        given.job_view("ended", JobState.SUCCEEDED),
        given.job_view("paused", JobState.PAUSED),
        given.job_view("runs"),
    ]
    assert [view.job.name for view in in_order(views)] == ["runs", "paused", "ended"]


def test_jobs_are_filtered_by_name_and_state(given: SimpleNamespace) -> None:
    """A word, a state, or what does not match."""
    views = [given.job_view("digits"), given.job_view("kjv", JobState.PAUSED)]
    assert [v.job.name for v in filtered(views, "digi")] == ["digits"]
    assert [v.job.name for v in filtered(views, "paused")] == ["kjv"]
    assert [v.job.name for v in filtered(views, "!paused")] == ["digits"]


def test_workers_that_are_gone_say_how(given: SimpleNamespace) -> None:
    """The leader, one that starts, and one that was killed."""
    gang = given.gang_of(1, 100)
    placements = (
        Placement(0, PlacementState.LAUNCHED, given.now),
        Placement(1, PlacementState.GONE, given.now, exit_code=137),
        Placement(2, PlacementState.LAUNCHED, given.now),
    )
    attempt = Attempt("id", 1, given.now, "", placements)
    rows = worker_rows(gang, attempt, MetricHistory())
    states = {row.key: row.cells[1] for row in rows}
    assert states["0"].text == "● leads"
    assert states["2"].text == "◑ starting"
    assert states["1"] == Span("□ gone, exit 137", Tone.BAD)
    assert [row.key for row in rows] == ["0", "2", "1"]


def test_a_slow_worker_is_marked(given: SimpleNamespace) -> None:
    """Its lag behind the usual step stands in amber."""
    history = MetricHistory()
    for worker, took in ((0, 0.1), (1, 0.1), (2, 0.2)):
        window = given.window(1.0, 10)
        phases = {"step": {"median": took}}
        fields = {**window.to_dict(), "worker": worker, "rank": worker, "phases": phases}
        history.add(1, type(window).from_dict(fields))
    rows = worker_rows(given.gang_of(3, 10), None, history)
    lags = [row.cells[-1] for row in rows]
    assert [lag.text for lag in lags] == ["+0%", "+0%", "+100%"]
    assert lags[2].tone is Tone.WARN


def test_a_damaged_checkpoint_is_never_preselected(given: SimpleNamespace) -> None:
    """The newest that is not known to be bad is what a resume starts from."""
    entries = [given.checkpoint(100), given.checkpoint(200, verified=False)]
    chosen = newest_good(entries)
    assert chosen is not None
    assert chosen.step == 100
    assert checkpoint_row(entries[1], given.now).cells[3].text == "✗ damaged"
    assert newest_good([]) is None


def test_the_configuration_shows_every_field_once(given: SimpleNamespace) -> None:
    """Nested fields by their full name, durations as people write them."""
    rows = {row.key: row.cells[1].text for row in config_rows(given.job_view().job)}
    assert rows["nodes"] == "1..4"
    assert rows["checkpoint.every"] == "10m"
    assert rows["resources.memory_bytes"] == "—"
    assert len(rows) == len(config_rows(given.job_view().job))


def test_a_line_reads_as_text() -> None:
    """Groups are set apart, and empty ones leave no hole."""
    line = Line(joined([(Span("a"), Span("b")), (), (Span("c"),)]), (Span("right"),))
    assert str(line) == "ab   c  right"
