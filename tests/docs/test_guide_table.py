"""The table at the end of the regularizers guide names a test for each of the 161 items, and the tests exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.test_docs_run import PAGES, ROOT, blocks_of, is_python

PAGE = ROOT / "docs" / "guides" / "regularizers.md"
ITEMS = 161
ROW = re.compile(r"^\| *(\d+) *\| *(.*?) *\| *(.*?) *\|$")
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def table_of(text: str) -> list[tuple[int, str, list[str]]]:
    """Number, item and tests of every row of the table under the page's last heading."""
    last_section = re.split(r"^## ", text, flags=re.MULTILINE)[-1]
    rows = [found for line in last_section.splitlines() if (found := ROW.match(line))]
    return [
        (int(number), item, re.findall(r"`([^`]+)`", tests)) for number, item, tests in (row.groups() for row in rows)
    ]


@cache
def definitions(path: Path) -> frozenset[str]:
    """Names of a file's functions and classes, those inside a class as `Class::name`."""

    def named(nodes: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in nodes:
            if isinstance(node, DEFINITIONS):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from named(node.body, f"{prefix}{node.name}::")

    return frozenset(named(ast.parse(path.read_text()).body))


def why_no_test(name: str) -> str | None:
    """What is wrong with `path::name` or `path::Class::name`, or None."""
    path, _, inside = name.partition("::")
    if not path.startswith("tests/") or not inside.split("::")[-1].startswith("test_"):
        return "is not the name of a test"
    if not (ROOT / path).is_file():
        return "is in a file that does not exist"
    return None if inside in definitions(ROOT / path) else "does not exist"


def test_no_row_is_missing_or_there_twice() -> None:
    assert [number for number, _, _ in table_of(PAGE.read_text())] == list(range(1, ITEMS + 1))


def test_every_row_says_what_it_is_and_which_test_proves_it() -> None:
    empty = [number for number, item, tests in table_of(PAGE.read_text()) if not item or not tests]
    assert empty == []


def test_the_tests_of_the_table_exist() -> None:
    wrong = [
        f"row {number}: {name} {problem}"
        for number, _, tests in table_of(PAGE.read_text())
        for name in tests
        if (problem := why_no_test(name))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tests/docs/test_guide_table.py::test_the_tests_of_the_table_exist", None),
        ("tests/docs/test_guide_table.py::TestInside::test_found", None),
        ("tests/docs/test_guide_table.py::test_found", "does not exist"),
        ("tests/docs/test_guide_table.py::TestInside", "is not the name of a test"),
        ("tests/docs/test_guide_table.py", "is not the name of a test"),
        ("tests/docs/test_nothing.py::test_found", "is in a file that does not exist"),
    ],
)
def test_a_test_that_does_not_exist_is_noticed(name: str, problem: str | None) -> None:
    assert why_no_test(name) == problem


class TestInside:
    def test_found(self) -> None:
        text = "## Before\n\n| 1 | a | `x` |\n\n## Last\n\n| | **Group** | |\n| 2 | `b` | `y`, `z` |\n| 2 | c | |\n"
        assert table_of(text) == [(2, "`b`", ["y", "z"]), (2, "c", [])]


def test_row_2_the_page_opens_with_the_four_purposes() -> None:
    opening = PAGE.read_text().split("## ")[1]
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
