"""The table of promises in docs/reliability.md names tests that exist, and says truly which were tried."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.guards.catalogue import GUARDS
from tests.guards.entry import names_of_tests

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
NAMED = re.compile(r"`([^`]+)`")
TRIED = {test.partition("[")[0] for entry in GUARDS for test in entry.tests}


@dataclass(frozen=True)
class Row:
    """One promise."""

    what: str
    tests: tuple[str, ...]
    files: tuple[str, ...]
    tried: str

    def ids(self, name: str) -> list[str]:
        """Where a test of the row is."""
        return [f"{file}::{name}" for file in self.files if name in names_of_tests(ROOT / file)]


def rows() -> list[Row]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    told = [row for row in cells if row[0] not in ("what", "---")]
    assert all(len(row) == 5 for row in told), [row for row in told if len(row) != 5]
    return [Row(what, tuple(NAMED.findall(t)), tuple(NAMED.findall(f)), tried) for what, _, t, f, tried in told]


def test_every_test_of_the_table_exists_in_a_file_of_its_row():
    assert len(rows()) > 60
    for row in rows():
        assert row.tests, row.what
        for name in row.tests:
            assert row.ids(name), f"{name} is in none of {row.files}"
        for file in row.files:
            assert any(f"{file}::{name}" in row.ids(name) for name in row.tests), f"{row.what}: nothing of {file}"


def test_tried_is_yes_exactly_where_every_test_has_an_entry():
    for row in rows():
        without_entry = [name for name in row.tests if not TRIED.intersection(row.ids(name))]
        assert row.tried == ("yes" if not without_entry else "-"), (row.what, without_entry)
