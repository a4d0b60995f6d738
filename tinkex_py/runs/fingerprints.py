"""Fingerprints of what a run trains on: code, captured values and data. A resumed run is compared with them.

The fingerprint of a function is that of its source without comments and docstrings, of what it captures, and of the
functions and constants of its own module that it uses. Without source (REPL, `exec`), bytecode and constants count,
which compare only under the same Python version.
"""

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
from pydantic import BaseModel

from tinkex_py.types import Datum

_LENGTH = 16
# All programs of `python -c`, `exec` and the REPL share these names.
_WITHOUT_SOURCE = ("<string>", "<stdin>")
_SCALARS: tuple[type, ...] = (bool, int, float, complex, str, bytes, np.generic)
_PLAIN = (*_SCALARS, tuple, list, dict, set, frozenset, np.ndarray)
# Classes whose earlier names are in the fingerprints of older runs.
_MOVED = {"tinkex_py.base_losses.preference:DPO": "tinkex_py.base_losses.likelihood:DPO"}
BYTECODE = f"python {sys.version_info.major}.{sys.version_info.minor}: "
"""Begins a fingerprint that compares only under this version of Python."""


def fingerprint(value: object) -> str | None:
    """Returns the fingerprint of a term, a schedule, or a plain value.

    Args:
        value: functions, partials, objects with `compute`, and what they capture: plain values, arrays and tensors.
            Other captured objects count by their class.

    Returns:
        16 hexadecimal digits, behind `BYTECODE` if code without source takes part; None where code can be read neither
        as source nor as bytecode.
    """
    walk = _Walk()
    walk.add(value)
    if walk.is_unknown:
        return None
    return (BYTECODE if walk.needs_same_python else "") + walk.digest()


def are_comparable(one: str, other: str) -> bool:
    """Returns whether two fingerprints are of the same kind: of source, or of bytecode of the same Python version."""
    return one.rpartition(" ")[0] == other.rpartition(" ")[0]


def batch_fingerprint(batch: Sequence[Datum]) -> str:
    """Returns the fingerprint of a batch: tokens and loss inputs of its datums, in order."""
    walk = _Walk()
    for datum in batch:
        walk.add(datum.model_input.to_ints() if datum.model_input.is_text else datum.model_input.model_dump())
        walk.add({name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()})
    return walk.digest()


class _Walk:
    """Feeds a value and what it captures to a hash, each object once."""

    def __init__(self) -> None:
        self.needs_same_python = False
        self.is_unknown = False
        self._hash = hashlib.sha256()
        self._seen: dict[int, object] = {}

    def digest(self) -> str:
        return self._hash.hexdigest()[:_LENGTH]

    def add(self, value: object) -> None:
        if value is None or isinstance(value, _SCALARS):
            self._text(f"{type(cast('object', value)).__name__} {value!r}")
        elif id(value) in self._seen:
            self._text(f"seen {list(self._seen).index(id(value))}")
        else:
            self._seen[id(value)] = value
            self._object(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self._all("method", value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self._all("partial", value.func, value.args, dict(value.keywords))
        elif isinstance(value, ModuleType):
            self._all("module", getattr(value, "compute", value.__name__))
        elif isinstance(value, type | BuiltinFunctionType):
            self._text(f"{value.__module__}:{value.__qualname__}")
        elif _is_tensor(value):
            self._array(value.detach().to_dense().cpu().contiguous())
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, Mapping):
            items = cast("Mapping[object, object]", value).items()
            self._all("mapping", *(part for item in sorted(items, key=lambda item: repr(item[0])) for part in item))
        elif isinstance(value, Set):
            self._all("set", *sorted(cast("Set[object]", value), key=repr))
        elif isinstance(value, Sequence):
            self._all("sequence", *cast("Sequence[object]", value))
        else:
            self._instance(value)

    def _all(self, kind: str, *values: object) -> None:
        self._text(f"{kind} {len(values)}")
        for value in values:
            self.add(value)

    def _array(self, array: Any) -> None:
        self._text(f"{array.dtype} {tuple(array.shape)}")
        if _is_tensor(array):
            torch: Any = sys.modules["torch"]
            array = array.reshape(-1).view(torch.uint8).numpy()
        self._hash.update(np.ascontiguousarray(array).tobytes())

    def _instance(self, value: Any) -> None:
        owner = cast("type[object]", type(value))
        name = f"{owner.__module__}:{owner.__qualname__}"
        self._text(_MOVED.get(name, name))
        if _is_own_code(owner):
            self._source(owner)
        settings = getattr(value, "settings", None)
        if is_dataclass(value):
            state = {field.name: getattr(value, field.name) for field in fields(value) if not _is_added(field, value)}
        elif isinstance(value, BaseModel):
            state = dict(value)
        elif callable(settings) and callable(getattr(value, "check_options", None)):
            state = settings()
        elif callable(value) or callable(getattr(value, "compute", None)):
            self.is_unknown |= not hasattr(value, "__dict__")
            state = dict(getattr(value, "__dict__", {}))
        else:
            return
        self.add(state)

    def _source(self, owner: type[object]) -> None:
        tree = _tree_of(owner)
        if tree is not None:
            self._text(ast.unparse(tree))
            return
        functions = [value for value in vars(owner).values() if isinstance(value, FunctionType)]
        self._all("class", *functions)

    def _function(self, function: FunctionType) -> None:
        is_own = _is_own_code(function)
        tree = _tree_of(function.__code__) if is_own else None
        if not is_own:
            self._text(f"{function.__module__}:{function.__qualname__}")
        elif tree is not None:
            self._text(ast.unparse(tree))
        else:
            self.needs_same_python = True
            self._code(function.__code__)
        self._all("captured", *_captured(function))
        if is_own:
            self._all("used", function.__defaults__, function.__kwdefaults__, *_own_globals(function))

    def _code(self, code: CodeType) -> None:
        self._hash.update(code.co_code)
        self._text(repr((code.co_names, code.co_varnames, code.co_flags)))
        for constant in code.co_consts[1 if _has_docstring(code) else 0 :]:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self.add(constant)

    def _text(self, text: str) -> None:
        encoded = text.encode("utf-8", "surrogatepass")
        self._hash.update(len(encoded).to_bytes(8, "big") + encoded)


def _is_tensor(value: object) -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_added(field: "Field[Any]", value: object) -> bool:
    """Whether a setting that earlier versions did not have has its default, so that older fingerprints compare."""
    return "added" in field.metadata and getattr(value, field.name) == field.default


def _is_own_code(code: FunctionType | type[object]) -> bool:
    """Returns whether code belongs to the user; installed packages count by name, and their versions are recorded."""
    package = code.__module__.partition(".")[0]
    if package == "__main__":
        return True
    if package == __name__.partition(".")[0] or package in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(code.__module__), "__file__", None)
    return file is None or not any(part in ("site-packages", "dist-packages") for part in Path(file).parts)


def _tree_of(code: CodeType | type[object]) -> ast.AST | None:
    """Returns the syntax tree without docstrings; None without source that is surely this code's."""
    if isinstance(code, CodeType) and code.co_filename in _WITHOUT_SOURCE:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    if isinstance(code, CodeType) and code.co_name == "<lambda>":
        lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        return lambdas[0] if len(lambdas) == 1 else None
    return tree


def _has_docstring(code: CodeType) -> bool:
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & inspect.CO_HAS_DOCSTRING)
    return bool(code.co_consts) and isinstance(code.co_consts[0], str)


def _captured(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            yield None


def _own_globals(function: FunctionType) -> Iterator[object]:
    """Yields the plain values, arrays and functions of its own module that a function uses."""
    for name in sorted(set(_names_in(function.__code__)) & function.__globals__.keys()):
        value = function.__globals__[name]
        is_own = isinstance(value, FunctionType | type) and value.__module__ == function.__module__
        if is_own and isinstance(value, type):
            yield from (method for method in vars(value).values() if isinstance(method, FunctionType))
        elif is_own or _is_tensor(value) or isinstance(value, _PLAIN):
            yield name
            yield value


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
