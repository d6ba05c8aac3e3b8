"""docs/dashboard.md names every key and every command."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from textual.binding import Binding

from dtp_tui.commandline import COMMANDS
from dtp_tui.screens.frame import Frame
from dtp_tui.screens.job import JobScreen
from dtp_tui.screens.jobs import JobsScreen
from dtp_tui.widgets.log_pane import LogPane
from dtp_tui.widgets.overview import Overview
from dtp_tui.widgets.table import LineTable

PAGE = (Path(__file__).parents[2] / "docs" / "dashboard.md").read_text(encoding="utf-8")
OWNERS = (Frame, JobsScreen, JobScreen, LineTable, LogPane, Overview)


def keys(bindings: Iterable[object]) -> Iterable[str]:
    """What stands on the key of each binding that a reader is told of."""
    for binding in bindings:
        if isinstance(binding, Binding) and binding.tooltip:
            yield binding.key_display or binding.key.split(",")[0]


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_every_key_is_documented(owner: type) -> None:
    """Each as it is printed on the keyboard."""
    missing = [key for key in keys(owner.BINDINGS) if f"`{key}`" not in PAGE and key not in PAGE]
    assert missing == []


def test_every_command_is_documented() -> None:
    """By its name."""
    assert [c.name for c in COMMANDS if f"`:{c.name}" not in PAGE] == []
