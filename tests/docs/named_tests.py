"""Checks that tests named in tables and lists exist, without running them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def problem_of(name: str) -> str | None:
    """Returns what is wrong with the name of a test; None if it exists.

    Args:
        name: `path::name` or `path::Class::name`, with the path below `tests/`; parameters are ignored.
    """
    path, _, inside = name.partition("[")[0].partition("::")
    if not inside.split("::")[-1].startswith(("test_", "Test")):
        return "is not the name of a test"
    if not (TESTS / path).is_file():
        return "is in a file that does not exist"
    return None if inside in _definitions(TESTS / path) else "does not exist"


@cache
def _definitions(path: Path) -> frozenset[str]:
    """Returns the names of functions and classes in a file; inside a class, `Class::name`."""

    def named(nodes: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in nodes:
            if isinstance(node, _DEFINITIONS):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from named(node.body, f"{prefix}{node.name}::")

    return frozenset(named(ast.parse(path.read_text(encoding="utf-8")).body))
