"""The catalogue fits the package and the tests, and trying an entry says what is true."""

import ast
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guards.catalogue import GUARDS
from tests.guards.copies import (
    AS_IT_SHOULD,
    HANGS,
    STALE,
    STILL_PASSES,
    judge,
    make_copy,
    run_tests,
    taken_out,
    try_without,
)
from tests.guards.entry import PACKAGE, Guard, Stale, names_of_tests, without
from tests.guards.observer import NOT_THE_COPY

ROOT = Path(__file__).parents[2]
ALIKE = "tests/transport/test_answer.py::test_media_type"


def test_every_guard_is_where_the_catalogue_says_and_leaves_python_without_it():
    stale: list[str] = []
    for entry in GUARDS:
        try:
            ast.parse(without(entry, ROOT))
        except (Stale, SyntaxError) as error:
            stale.append(f"{entry.promise} ({entry.file}): {error}")
    assert stale == []


def test_every_test_of_the_catalogue_exists():
    for entry in GUARDS:
        for test in entry.tests:
            file, _, name = test.partition("::")
            assert name.partition("[")[0] in names_of_tests(ROOT / file), test


def test_no_entry_is_there_twice():
    assert len({(entry.file, entry.text, entry.instead) for entry in GUARDS}) == len(GUARDS)
    assert len({entry.promise for entry in GUARDS}) == len(GUARDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy to try entries in."""
    folder = tmp_path_factory.mktemp("guards")
    yield make_copy(ROOT, folder)
    shutil.rmtree(folder)


def test_an_entry_of_the_catalogue_for_real(root: Path):
    entry = next(entry for entry in GUARDS if "retry-after-ms" in entry.promise)
    before = (root / PACKAGE / entry.file).read_text(encoding="utf-8")
    verdict = try_without(entry, root, 60.0)
    assert verdict.word == AS_IT_SHOULD
    assert "assert" in verdict.reasons[0]
    assert (root / PACKAGE / entry.file).read_text(encoding="utf-8") == before


MEDIA_TYPE = Guard(
    promise="the media type is told in lower case",
    file="transport/answer.py",
    text='.partition(";")[0].strip().lower()',
    instead='.partition(";")[0].strip()',
    tests=(ALIKE,),
)


def test_a_test_that_does_not_fail_is_told(root: Path):
    """Of two tests the one that has nothing to do with it is named, also where the other fails."""
    other = "tests/transport/test_answer.py::test_success_raises_nothing"
    verdict = try_without(replace(MEDIA_TYPE, tests=(ALIKE, other)), root, 60.0)
    assert (verdict.word, verdict.reasons) == (STILL_PASSES, (other,))


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({"text": "nobody wrote this"}, STALE, "the text is there 0 times"),
        ({"text": "answer"}, STALE, "times"),
        ({"file": "no_such_file.py"}, STALE, "there is no no_such_file.py"),
        ({"tests": ("tests/transport/test_answer.py::test_nothing",)}, "error", "exit code 4"),
        ({"instead": "broken("}, "error", "exit code"),
    ],
)
def test_an_entry_that_is_wrong_is_told(root: Path, changes: dict[str, object], word: str, reason: str):
    verdict = try_without(replace(MEDIA_TYPE, **changes), root, 60.0)  # pyright: ignore[reportArgumentType]
    assert verdict.word == word
    assert reason in verdict.reasons[0]


def test_a_hang_counts_only_where_it_may_be(root: Path):
    endless = replace(MEDIA_TYPE, instead='.partition(";")[0] if [*iter(str, 1)] else ""')
    with taken_out(endless, root):
        outcome = run_tests(root, endless.tests, 5.0)
    assert outcome.code is None
    assert judge(endless, outcome).word == HANGS
    assert judge(replace(endless, may_hang=True), outcome).word == AS_IT_SHOULD


def test_another_package_than_the_copy_is_noticed(tmp_path: Path):
    """As it would be where the environment's own installation went first."""
    root = make_copy(ROOT, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(root / PACKAGE, elsewhere / PACKAGE)
    (root / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(elsewhere)!r})\n")
    assert run_tests(root, [ALIKE], 60.0).code == NOT_THE_COPY
