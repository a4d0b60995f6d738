"""Checks of arguments, and optional fields of requests."""

import re
from typing import Any

from tinkex_py.errors import InvalidData
from tinkex_py.values import as_integer

_CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def check_text(name: str, value: object) -> None:
    """Raises InvalidData unless an argument is a non-empty string."""
    if not isinstance(value, str) or not value:
        raise InvalidData(f"{name} must be a non-empty string, got {value!r}")


def check_count(name: str, value: object, *, least: int) -> int:
    """Returns an argument as an int; raises InvalidData if it is no integer or too small."""
    count = as_integer(value)
    if count is None or count < least:
        raise InvalidData(f"{name} must be an int >= {least}, got {value!r}")
    return count


def check_name(name: str) -> str:
    """Returns a checkpoint name if the service can use it as a path segment; else raises InvalidData."""
    if not isinstance(name, str) or not _CHECKPOINT_NAME.fullmatch(name):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"a checkpoint name consists of 1 to 128 letters, digits, '_', '.' or '-', got {name!r}")
    return name


def given(**fields: Any) -> dict[str, Any]:
    """Returns the fields that are not None: services may refuse fields that they do not know."""
    return {name: value for name, value in fields.items() if value is not None}
