"""The catalogue matches the package and the tests, and trying a guard reports the truth."""

import ast
from pathlib import Path

import pytest

from tests.docs.named_tests import problem_of
from tests.guards.__main__ import make_copy, try_without
from tests.guards.catalogue import GUARDS, PACKAGE, Guard

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("entry", GUARDS, ids=lambda entry: entry.promise)
def test_a_guard_occurs_once_and_its_tests_exist(entry: Guard):
    content = (ROOT / PACKAGE / entry.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(entry.without(content))) != ast.dump(ast.parse(content))
    assert [test for test in entry.tests if problem_of(test.removeprefix("tests/"))] == []
    assert entry.tests


def test_promises_are_unique():
    assert len({entry.promise for entry in GUARDS}) == len(GUARDS)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a package with one function, tested without any other plugin."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    files = {
        f"{PACKAGE}/__init__.py": "def double(x):\n    return 2 * x\n",
        "tests/test_double.py": (
            f"from {PACKAGE} import double\ndef test_two():\n    assert double(2) == 4\n"
            "def test_one():\n    assert double(1) != 3\n"
        ),
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = ["-p", "pytest_timeout"]\n',
    }
    for name, content in files.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_text(content)
    (tmp_path / "copy").mkdir()
    make_copy(tmp_path / "repository", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("instead", "outcomes"),
    [
        ("x + 2", ["passed", "failed"]),
        ("2 *", ["broken", "broken"]),
        ("next(y for y in iter(int, 1) if y)", ["failed"]),
    ],
)
def test_the_outcomes_of_a_guard(root: Path, instead: str, outcomes: list[str]):
    tests = ("tests/test_double.py::test_two", "tests/test_double.py::test_one")
    entry = Guard("doubles", "__init__.py", "2 * x", instead, tests[: len(outcomes)])
    seconds = 2.0 if "iter" in instead else 60.0
    assert [one.outcome for one in try_without(entry, root, seconds)] == outcomes
    assert "2 * x" in (root / PACKAGE / "__init__.py").read_text()


@pytest.mark.parametrize("text", ["3 * x", "x"])
def test_a_guard_that_does_not_occur_once_is_an_error(root: Path, text: str):
    with pytest.raises(ValueError, match="instead of once"):
        try_without(Guard("doubles", "__init__.py", text, "", ("tests/test_double.py",)), root, 60.0)
