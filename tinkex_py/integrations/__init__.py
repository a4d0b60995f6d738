"""Integrations with other packages, each of which needs the extra of its name; and terms over HTTP, which need none."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinkex_py.errors import MissingExtra

if TYPE_CHECKING:
    from tinkex_py.integrations.http import http_term as http_term


def __getattr__(name: str) -> Any:
    if name == "http_term":  # which imports torch
        return import_module("tinkex_py.integrations.http").http_term
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def imported(module: str, extra: str) -> Any:
    """Imports a module of an optional package.

    Args:
        module: its full name.
        extra: the extra of this package that installs it.

    Raises:
        MissingExtra: the module, or a module that it needs, is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise MissingExtra(missing.partition(".")[0], extra) from error
