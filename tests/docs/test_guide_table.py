"""The table of the regularizers guide names an existing test for each of its 161 items."""

import ast
import re

import pytest

from tests.docs.named_tests import problem_of
from tests.docs.test_docs_run import PAGES, ROOT, blocks_of, is_python

GUIDE = ROOT / "docs" / "guides" / "regularizers.md"
TABLE = ROOT / "docs" / "contributing" / "guide_table.md"
ITEMS = 161
ROW = re.compile(r"^\| *(\d+) *\| *(.*?) *\| *(.*?) *\|$")


def table_of(text: str) -> list[tuple[int, str, list[str]]]:
    """Returns the number, item and tests of every row; rows without a number are headings."""
    rows = [found for line in text.splitlines() if (found := ROW.match(line))]
    return [
        (int(number), item, re.findall(r"`([^`]+)`", tests)) for number, item, tests in (row.groups() for row in rows)
    ]


def test_rows_are_complete_and_unique() -> None:
    assert [number for number, _, _ in table_of(TABLE.read_text())] == list(range(1, ITEMS + 1))


def test_every_row_has_an_item_and_a_test() -> None:
    empty = [number for number, item, tests in table_of(TABLE.read_text()) if not item or not tests]
    assert empty == []


def test_the_tests_of_the_table_exist() -> None:
    wrong = [
        f"row {number}: {name} {problem}"
        for number, _, tests in table_of(TABLE.read_text())
        for name in tests
        if (problem := problem_of(name))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("docs/test_guide_table.py::test_the_tests_of_the_table_exist", None),
        ("docs/test_guide_table.py::test_a_missing_test_is_reported[any]", None),
        ("docs/test_guide_table.py::TestInside", None),
        ("docs/test_guide_table.py::TestInside::test_found", None),
        ("docs/test_guide_table.py::test_found", "does not exist"),
        ("docs/test_guide_table.py::table_of", "is not the name of a test"),
        ("docs/test_guide_table.py", "is not the name of a test"),
        ("docs/test_nothing.py::test_found", "is in a file that does not exist"),
    ],
)
def test_a_missing_test_is_reported(name: str, problem: str | None) -> None:
    assert problem_of(name) == problem


class TestInside:
    def test_found(self) -> None:
        text = "| row | item | test |\n| --- | --- | --- |\n| | **Group** | |\n| 2 | `b` | `y`, `z` |\n| 2 | c | |\n"
        assert table_of(text) == [(2, "`b`", ["y", "z"]), (2, "c", [])]


def test_row_2_the_page_opens_with_the_four_purposes() -> None:
    opening = GUIDE.read_text().split("## ")[1]
    assert re.findall(r"^- \*\*([^*]+)\*\*", opening, re.MULTILINE) == [
        "Sparsity",
        "Weight decay",
        "Entropy",
        "Custom constraints",
    ]


def test_row_13_pages_and_examples_give_specs_by_keyword() -> None:
    pages = {page.name: [block.text for block in blocks_of(page) if is_python(block)] for page in PAGES}
    examples = {path.name: [path.read_text()] for path in (ROOT / "examples").glob("*.py")}
    sources = [(name, text) for name, texts in {**pages, **examples}.items() for text in texts]
    calls = [
        (name, call)
        for name, text in sources
        for call in ast.walk(compile(text, name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "RegularizerSpec"
    ]
    assert len(calls) > 30
    assert [f"{name}, line {call.lineno}" for name, call in calls if call.args] == []
