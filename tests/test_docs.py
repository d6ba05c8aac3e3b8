"""What the papers say is there and is measured."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import table

ROOT = Path(__file__).parents[1]
PAPERS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_links_lead_somewhere(paper: Path) -> None:
    """Every relative link of a paper names a file that is there."""
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", paper.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (paper.parent / link).exists()] == []


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    """`python -m benchmarks.table` changes nothing."""
    assert table.in_readme() == table.table()


def test_make_help_lists_every_target() -> None:
    """Each target of the Makefile says what it is for."""
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in targets if f"make {name}" not in said.stdout] == []


def test_every_page_is_named_in_the_readme() -> None:
    """A page that nobody finds is not there."""
    readme = (ROOT / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"docs/{p.name}" not in readme] == []
