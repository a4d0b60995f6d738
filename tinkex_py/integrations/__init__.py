"""Integrations with other packages. Each needs the extra of its name."""

from importlib import import_module
from typing import Any

from tinkex_py.errors import MissingExtra


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
