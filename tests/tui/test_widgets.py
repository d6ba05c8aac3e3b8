"""Widgets alone in an app: what they draw, and what they repaint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from textual.app import App, ComposeResult
from textual.strip import Strip
from textual.widget import Widget

from dtp_engine.series import Mark, MarkKind, Series
from dtp_trainer import wire
from dtp_tui import dashboard
from dtp_tui.widgets.chart import Chart, Curve, Plot
from dtp_tui.widgets.log_buffer import LogBuffer, entry
from dtp_tui.widgets.log_pane import LogView
from dtp_tui.widgets.spans import Span
from dtp_tui.widgets.table import Column, LineTable, Row


class Stage(App[None]):
    CSS_PATH = dashboard.DtpApp.CSS_PATH

    def __init__(self, widget: Widget) -> None:
        super().__init__(css_path=dashboard.__file__.replace("dashboard.py", "app.tcss"))
        self.widget = widget
        self.register_theme(dashboard.THEME)
        self.theme = "dtp"

    def compose(self) -> ComposeResult:
        yield self.widget


def text(widget: Widget) -> list[str]:
    return [strip_text(widget.render_line(y)) for y in range(widget.size.height)]


def strip_text(strip: Strip) -> str:
    return "".join(segment.text for segment in strip)


def falling(points: int) -> Series:
    series = Series("loss")
    for index in range(points):
        series.add(1000.0 + index, index, 2.0 - 2.0 * index / points)
    return series


def plot_of(series: Series, *marks: Mark) -> Plot:
    view = partial(series.view, start=1000.0, end=1100.0)
    return Plot("Loss", (Curve("", "0.02", view),), 1000.0, 1100.0, marks=marks)


async def test_a_chart_draws_title_newest_value_axis_and_curve() -> None:
    """The first column is high, the last is low, labels stand at the left and below."""
    chart = Chart("Loss")
    async with Stage(chart).run_test(size=(60, 12)):
        chart.show(plot_of(falling(100)))
        lines = text(chart)
    assert len(lines) == 12
    assert "Loss" in lines[0]
    assert lines[0].rstrip().endswith("0.02")
    assert any(0x2800 < ord(char) <= 0x28FF for char in lines[1][8:20])
    assert any(0x2800 < ord(char) <= 0x28FF for char in lines[10][48:])
    assert not any(0x2800 < ord(char) <= 0x28FF for char in lines[10][8:20])
    assert lines[10].lstrip().startswith("0")
    assert ":" in lines[11]


async def test_a_chart_marks_failures_and_checkpoints() -> None:
    """A line through the plot for a failure, a sign on the axis for a checkpoint."""
    marks = (
        Mark(1026.0, 26, MarkKind.CHECKPOINT, "checkpoint"),
        Mark(1056.0, 56, MarkKind.FAILURE, "rank 1 failed"),
    )
    chart = Chart("Loss")
    async with Stage(chart).run_test(size=(120, 12)):
        chart.show(plot_of(falling(100), *marks))
        lines = text(chart)
    assert "┊" in lines[1]
    assert "✗" in lines[11]
    assert "▴" in lines[11]


async def test_a_chart_without_data_says_so_at_any_size() -> None:
    """And one that is too small for anything is just its title."""
    chart = Chart("Loss")
    async with Stage(chart).run_test(size=(60, 8)) as pilot:
        assert any("no data yet" in line for line in text(chart))
        await pilot.resize_terminal(12, 2)
        assert len(text(chart)) == 2


async def test_a_chart_that_did_not_change_is_not_painted() -> None:
    """The same plot twice costs nothing."""
    chart = Chart("Loss")
    async with Stage(chart).run_test(size=(60, 12)) as pilot:
        chart.show(plot_of(falling(100)))
        await pilot.pause()
        painted = count_refreshes(chart)
        chart.show(plot_of(falling(100)))
        assert painted == []


def count_refreshes(widget: Widget) -> list[object]:
    """Grows with each repaint that the widget asks for from now on."""
    asked: list[object] = []
    ask = widget.refresh

    def refresh(*regions: object, **options: bool) -> Widget:
        asked.append(regions)
        return ask(*regions, **options)

    widget.refresh = refresh
    return asked


def rows(*names: str, changed: str = "") -> Sequence[Row]:
    return [Row(n, (Span(n), Span("new" if n == changed else "old"))) for n in names]


async def test_a_table_repaints_only_the_rows_that_changed() -> None:
    """One changed row of four is one region of one line."""
    table = LineTable([Column("NAME", 10), Column("VALUE", 10)])
    async with Stage(table).run_test(size=(40, 10)) as pilot:
        table.show(rows("a", "b", "c", "d"))
        await pilot.pause()
        painted = count_refreshes(table)
        table.show(rows("a", "b", "c", "d", changed="c"))
        assert [region.y for (region,) in painted] == [3]


async def test_the_cursor_stays_on_its_row() -> None:
    """However the others come and go."""
    table = LineTable([Column("NAME", 10), Column("VALUE", 10)])
    async with Stage(table).run_test(size=(40, 10)):
        table.show(rows("a", "b", "c"))
        table.select("b")
        table.show(rows("x", "a", "b", "c"))
        assert table.key == "b"
        table.show(rows("x"))
        assert table.key == "x"
        table.show([])
        assert table.key is None


async def test_a_long_table_scrolls_with_the_cursor() -> None:
    """Below a header that stays."""
    table = LineTable([Column("NAME", 10), Column("VALUE", 10)])
    async with Stage(table).run_test(size=(40, 10)) as pilot:
        table.show(rows(*(f"row{n:02}" for n in range(50))))
        table.focus()
        await pilot.press("G")
        await pilot.pause()
        lines = text(table)
        assert "NAME" in lines[0]
        assert "row49" in lines[9]
        await pilot.press("g")
        await pilot.pause()
        assert "row00" in text(table)[1]


def say(*texts: str, source: str = "rank0") -> list[object]:
    return [entry(wire.Text(1000.0, source, "out", line)) for line in texts]


async def test_a_log_follows_its_end_until_the_reader_scrolls_up() -> None:
    """Then it stands still and counts what is new below, until G."""
    view = LogView()
    async with Stage(view).run_test(size=(60, 12)) as pilot:
        pane = view.pane
        pane.focus()
        pane.append(say(*(f"line {n}" for n in range(100))))
        await pilot.pause()
        assert "line 99" in text(pane)[-1]
        await pilot.press("k", "k")
        await pilot.pause()
        top = text(pane)[0]
        pane.append(say("late 1", "late 2"))
        await pilot.pause()
        assert text(pane)[0] == top
        assert "▼ 2 new" in text(view.query_one("#log-indicator"))[0]
        await pilot.press("G")
        await pilot.pause()
        assert "late 2" in text(pane)[-1]
        assert "new" not in text(view.query_one("#log-indicator"))[0]


async def test_a_flooded_log_stays_bounded_and_shows_the_end() -> None:
    """100,000 lines in batches: the ring holds its capacity, the last line is on the screen."""
    view = LogView()
    async with Stage(view).run_test(size=(60, 12)) as pilot:
        pane = view.pane
        pane.replace_buffer(LogBuffer(capacity=2_000))
        for start in range(0, 100_000, 1_000):
            pane.append(say(*(f"line {n}" for n in range(start, start + 1_000))))
        await pilot.pause()
        assert len(pane.buffer) <= 2_250
        assert "line 99999" in text(pane)[-1]
        assert "98,000 older" in text(view.query_one("#log-indicator"))[0]


async def test_hostile_lines_take_one_row_each() -> None:
    """A megabyte, binary, wide letters and escapes neither wrap nor break the layout."""
    view = LogView()
    async with Stage(view).run_test(size=(60, 12)) as pilot:
        pane = view.pane
        binary = bytes(range(256)).decode("latin-1")
        pane.append(say("x" * 1_000_000, binary, "日本語" * 500, "\x1b[2J\x1b[31mred", ""))
        await pilot.pause()
        strips = [pane.render_line(y) for y in range(pane.size.height)]
        assert {strip.cell_length for strip in strips} == {pane.size.width}
        assert all("\x1b" not in strip_text(strip) for strip in strips)
        assert pane.buffer.shown == 5


async def test_one_rank_at_a_time() -> None:
    """The full stop goes through the ranks, ``a`` shows all again."""
    view = LogView()
    async with Stage(view).run_test(size=(60, 12)) as pilot:
        pane = view.pane
        pane.focus()
        pane.append([*say("from 0"), *say("from 1", source="rank1")])
        await pilot.press("full_stop", "full_stop")
        await pilot.pause()
        assert "from 1" in text(pane)[0]
        assert "rank1" in text(view.query_one("#log-indicator"))[0]
        await pilot.press("a")
        await pilot.pause()
        assert "from 0" in text(pane)[0]
