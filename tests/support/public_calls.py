"""Finds every public callable of the package and its parameters."""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, is_typeddict

from pydantic import BaseModel

import tinkex_py

_REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
_ONE_VALUE = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
)


@dataclass(frozen=True)
class PublicCall:
    """One callable that users call.

    Attributes:
        name: its name without the package, such as `client.AsyncTrainingClient.save_state`.
        owner: the class whose instance it needs, None for functions, constructors, class and static methods.
        function: the function, or the attribute of the class.
        parameters: its parameters, without `self` and `**options`.
    """

    name: str
    owner: type | None
    function: Callable[..., Any]
    parameters: tuple[inspect.Parameter, ...]


def public_calls() -> list[PublicCall]:
    """Returns the callables behind `__all__` of every package, and behind the names of the API reference."""
    seen: set[int] = set()
    found: list[PublicCall] = []
    for value in _public_values():
        for call, identity in _calls_of(value):
            if identity not in seen and call.parameters:
                seen.add(identity)
                found.append(call)
    return sorted(found, key=lambda call: call.name)


def constructor_of(cls: type) -> PublicCall:
    """Returns the constructor of a class."""
    return PublicCall(_short(cls), None, cls, _parameters(cls))


def _public_values() -> Iterator[Any]:
    packages = [tinkex_py, *(import_module(found.name) for found in _packages() if found.ispkg)]
    for package in packages:
        for name in getattr(package, "__all__", ()):
            yield getattr(package, name)
    for page in sorted(_REFERENCE.glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            yield pkgutil.resolve_name(name)


def _packages() -> Iterator[pkgutil.ModuleInfo]:
    return pkgutil.walk_packages(tinkex_py.__path__, "tinkex_py.")


def _calls_of(value: Any) -> Iterator[tuple[PublicCall, int]]:
    if isinstance(value, ModuleType):
        for name, inner in vars(value).items():
            if name[0] != "_" and getattr(inner, "__module__", None) == value.__name__:
                yield from _calls_of(inner)
    elif inspect.isfunction(value):
        yield PublicCall(_short(value), None, value, _parameters(value)), id(value)
    elif inspect.isclass(value) and value.__module__.startswith("tinkex_py") and not _declares_only(value):
        if not inspect.isabstract(value) and not _is_result(value):
            yield constructor_of(value), id(value)
        yield from _methods_of(value)


def _is_result(cls: type) -> bool:
    """Whether users only read the objects of a class, such as a response: it is a plain pydantic model."""
    return issubclass(cls, BaseModel) and cls.__init__ is BaseModel.__init__


def _declares_only(cls: type) -> bool:
    return issubclass(cls, BaseException) or is_typeddict(cls) or getattr(cls, "_is_protocol", False)


def _methods_of(cls: type) -> Iterator[tuple[PublicCall, int]]:
    for name in dir(cls):
        defined = inspect.getattr_static(cls, name)
        attribute = getattr(cls, name)
        if isinstance(defined, property) and name[0] != "_":
            yield from _calls_of_property(cls, name, defined)
        elif name[0] == "_" and name != "__call__":
            continue
        elif isinstance(defined, classmethod | staticmethod) and attribute.__module__.startswith("tinkex_py"):
            yield PublicCall(f"{_short(cls)}.{name}", None, attribute, _parameters(attribute)), id(defined.__func__)
        elif inspect.isfunction(defined) and defined.__module__.startswith("tinkex_py"):
            yield PublicCall(f"{_short(cls)}.{name}", cls, defined, _parameters(defined)[1:]), id(defined)


def _calls_of_property(cls: type, name: str, defined: property) -> Iterator[tuple[PublicCall, int]]:
    def set_it(made: Any, **new: Any) -> None:
        setattr(made, *new.popitem())

    def compute(term: Any, **given: Any) -> Any:
        return term.compute(**given)

    if defined.fset is not None:
        yield PublicCall(f"{_short(cls)}.{name}", cls, set_it, _named(name)), id(defined)
    if name == "compute":  # a function that depends on the settings of the term
        yield PublicCall(f"{_short(cls)}.compute", cls, compute, _named("data", "logprobs")), id(defined)


def _named(*names: str) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names)


def _parameters(function: Any) -> tuple[inspect.Parameter, ...]:
    given = inspect.signature(function).parameters.values()
    return tuple(parameter for parameter in given if parameter.kind in _ONE_VALUE)


def _short(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}".removeprefix("tinkex_py.")
