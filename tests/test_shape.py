"""The shape of the package: no circles of imports, no private names of others, unique class names, short files."""

import ast
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import tinkex_py

ROOT = Path(tinkex_py.__file__).parent
LONGEST_FILE = 450
GENERATED = {"transport/wire.py"}
_BY_NAME = ("getattr", "setattr")


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package, by its dotted name."""
    found: dict[str, tuple[Path, ast.Module]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file, ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports_of(name: str) -> set[str]:
    """The modules of the package that one imports, also inside functions and for types only."""
    imported: set[str] = set()
    for node in ast.walk(modules()[name][1]):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= (below & modules().keys()) or {node.module}
    return (imported & modules().keys()) - {name}


def circles() -> list[list[str]]:
    """Groups of modules that import each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imports_of(name)):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in modules():
        if name not in index:
            visit(name)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_private_names() -> set[str]:
    """Every private name that the package itself defines, in a class, a module or on an object."""
    own: set[str] = set()
    for _, tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                own |= {node.value} if node.value.isidentifier() and is_slot(tree, node) else set()
    return own


@cache
def slots_of(tree: ast.Module) -> frozenset[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__slots__" for t in node.targets):
            found |= {id(constant) for constant in ast.walk(node.value)}
    return frozenset(found)


def is_slot(tree: ast.Module, node: ast.Constant) -> bool:
    return id(node) in slots_of(tree)


def private_names_of_others() -> Iterator[str]:
    own = own_private_names()
    for file, tree in modules().values():
        where = file.relative_to(ROOT)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                yield f"{where}:{node.lineno} .{node.attr}"
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                foreign = not node.module.startswith("tinkex_py")
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                if foreign and any(map(is_private, names)) and node.module != "__future__":
                    yield f"{where}:{node.lineno} from {node.module} import {', '.join(a.name for a in node.names)}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME:
                name = node.args[1] if len(node.args) > 1 else None
                if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                    yield f"{where}:{node.lineno} {node.func.id} {name.value!r}"


def test_no_circles_of_imports():
    assert circles() == []


def test_no_private_names_of_dependencies():
    assert list(private_names_of_others()) == []


def test_no_two_classes_of_one_name():
    """Private ones count too: a reader searches for the name."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_file_is_too_long_to_read():
    long = {
        str(file.relative_to(ROOT)): count
        for file, _ in modules().values()
        if (count := len(file.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert {file: count for file, count in long.items() if file not in GENERATED} == {}


def test_the_scan_finds_what_it_looks_for():
    """Names that it must see, so that an empty result means something."""
    assert "tinkex_py.client.passes" in imports_of("tinkex_py.client.custom_step")
    assert "_ordering" in own_private_names()
    assert importlib.util.find_spec("tinkex_py") is not None
    assert sys.modules["tinkex_py"] is tinkex_py
