"""One guard: a few lines that keep a promise, and the tests that must fail without them."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "tinkex_py"


class Stale(Exception):
    """The text of a guard is not exactly once in its file."""


@dataclass(frozen=True)
class Guard:
    """What keeps a promise.

    Attributes:
        promise: what is kept.
        file: where, below the package.
        text: the guard as it stands there, exactly once.
        instead: what stands there once the guard is taken out.
        tests: node ids of pytest; each must fail then. Without its parameters an id stands for any of them.
        may_hang: a test that does not end counts as failed.
    """

    promise: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]
    may_hang: bool = False


def guard(promise: str, file: str, text: str, instead: str, *tests: str, may_hang: bool = False) -> Guard:
    """One entry of the catalogue."""
    assert tests, f"no test proves {promise!r}"
    assert text != instead, f"nothing is taken out of {file}"
    return Guard(promise, file, text, instead, tests, may_hang)


def without(entry: Guard, root: Path) -> str:
    """The content of the guard's file without the guard.

    Args:
        entry: the guard.
        root: the folder that the package is in.

    Raises:
        Stale: the file has changed since.
    """
    path = root / PACKAGE / entry.file
    if not path.is_file():
        raise Stale(f"there is no {entry.file}")
    content = path.read_text(encoding="utf-8")
    if (count := content.count(entry.text)) != 1:
        raise Stale(f"the text is there {count} times")
    return content.replace(entry.text, entry.instead)


@cache
def names_of_tests(file: Path) -> frozenset[str]:
    """The names of what pytest finds in a file, found without running it."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, kinds)]
    return frozenset(name for name in names if name.startswith(("test_", "Test")))
