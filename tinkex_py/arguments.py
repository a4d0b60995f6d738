"""Checks of the arguments of public calls, one for each kind.

Each error names the argument, shows its value on one line, and says what is expected.
"""

import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from tinkex_py.errors import InvalidData, TinkexError
from tinkex_py.unicode import half_at

Kind = TypeVar("Kind")
Item = TypeVar("Item")

_LONGEST = 200
# Services store integers in 64 bits.
_LARGEST = 2**63 - 1


def shown(value: object) -> str:
    """Returns a value as messages show it: its repr on one line, shortened; its type if it cannot be printed."""
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except Exception:  # noqa: BLE001  (the class of a user, or an int that is too large to print)
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def plain(value: Any) -> Any:
    """Returns numpy scalars as Python's, and everything else unchanged."""
    return cast("Any", value).item() if isinstance(value, np.generic) else value


def as_integer(value: object) -> int | None:
    """Returns an integer of any library, or a whole float such as YAML's `1e2`; None for all else, bools included."""
    number: object = plain(value)
    if isinstance(number, bool):
        return None
    if isinstance(number, float):
        return int(number) if number.is_integer() else None
    try:
        return operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_number(value: object) -> float | None:
    """Returns a number of any library as a float; None for all else, texts and bools included."""
    number: object = plain(value)
    if isinstance(number, bool | str | bytes):
        return None
    try:
        return float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def check_text(name: str, value: object, *, error: type[TinkexError] = InvalidData) -> str:
    """Returns a non-empty string that can be encoded; raises an error for anything else."""
    if not isinstance(value, str) or not value:
        raise error(f"{name} must be a non-empty string, got {shown(value)}")
    if half_at(value) is not None:
        raise error(f"{name} contains half a character (a lone surrogate), which cannot be encoded: {shown(value)}")
    return value


def check_count(name: str, value: object, *, least: int, error: type[TinkexError] = InvalidData) -> int:
    """Returns an integer that is at least `least` and fits into 64 bits; raises an error for anything else."""
    count = as_integer(value)
    if count is None or count < least:
        raise error(f"{name} must be an int >= {least}, got {shown(value)}")
    if count > _LARGEST:
        raise error(f"{name} must be at most 2**63 - 1, got {shown(value)}")
    return count


def check_flag(name: str, value: object, *, error: type[TinkexError] = InvalidData) -> bool:
    """Returns a bool; raises an error for anything else."""
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False, got {shown(value)}")
    return value


def check_choice(name: str, value: object, choices: Iterable[str], *, error: type[TinkexError] = InvalidData) -> None:
    """Raises an error unless a value is one of several strings."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise error(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def check_kind(
    name: str, value: object, kind: type[Kind], advice: str = "", *, error: type[TinkexError] = InvalidData
) -> Kind:
    """Returns an object of a class; raises an error with some advice for anything else."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        hint = f": {advice}" if advice else ""
        raise error(f"{name} must be {article} {kind.__name__}, got a {type(value).__name__}{hint}")
    return value


def check_list(name: str, value: object, kind: type[Kind], *, error: type[TinkexError] = InvalidData) -> Sequence[Kind]:
    """Returns a sequence of objects of a class, which may be empty; raises an error for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise error(f"{name} must be a list of {kind.__name__}, got a {type(value).__name__}")
    for index, item in enumerate(cast("Sequence[object]", value)):
        check_kind(f"{name}[{index}]", item, kind, error=error)
    return cast("Sequence[Kind]", value)


def check_items(name: str, value: Sequence[Item], *, error: type[TinkexError] = InvalidData) -> Sequence[Item]:
    """Returns a sequence of anything, which may be empty; raises an error for anything else, such as a text."""
    given = cast("object", value)
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise error(f"{name} must be a list, got a {type(given).__name__}")
    return value


def check_function(name: str, value: object, *, error: type[TinkexError] = InvalidData) -> None:
    """Raises an error unless a value can be called."""
    if not callable(value):
        raise error(f"{name} must be a function, got {shown(value)}")


def check_labels(name: str, value: object) -> dict[str, str]:
    """Returns a mapping of strings to strings as a dict; raises InvalidData for anything else."""
    labels = check_mapping(name, value)
    for label, content in labels.items():
        if not isinstance(content, str):
            raise InvalidData(f"{name} must map names to strings, got {label!r}: {shown(content)}")
    return labels


def check_options(name: str, value: object, *, error: type[TinkexError] = InvalidData) -> dict[str, Any]:
    """Returns a mapping of strings to anything as a dict; raises an error for anything else."""
    if not isinstance(value, Mapping):
        raise error(f"{name} must map names to values, got a {type(value).__name__}")
    fields = dict(cast("Mapping[Any, Any]", value))
    for field in fields:
        if not isinstance(field, str):
            raise error(f"the names of {name} must be strings, got {shown(field)}")
    return fields


def check_mapping(name: str, value: object) -> dict[str, Any]:
    """Returns a mapping of strings to values of JSON as a dict; raises InvalidData for anything else."""
    fields = check_options(name, value)
    for field, content in fields.items():
        try:
            json.dumps(content, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise InvalidData(f"{name}[{field!r}] cannot be represented in JSON: {shown(content)}") from None
    return fields


def check_path(name: str, value: object, *, error: type[TinkexError] = InvalidData) -> Path:
    """Returns a path of a file or folder, with `~` replaced by the home; raises an error for anything else."""
    text: object = os.fspath(cast("os.PathLike[Any]", value)) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text or half_at(text) is not None:
        raise error(f"{name} must be the path of a file or folder, got {shown(cast('object', value))}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise error(f"{name}: there is no home folder for {text!r}") from None
