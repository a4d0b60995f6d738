"""Settings and arguments as people write them: numbers of any library, paths with `~`, and problems in words."""

import difflib
import operator
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from tinkex_py.errors import ConfigError


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


def as_path(value: object, name: str) -> Path:
    """Returns a path with `~` expanded.

    Raises:
        ConfigError: the value is no path, or the home folder of `~user` is unknown; the message begins with `name`.
    """
    try:
        return _path(value)
    except ValueError as error:
        raise ConfigError(f"{name} {error}") from None


def _path(value: object) -> Path:
    text = os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise ValueError(f"must be a path, such as 'runs/first', got {value!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"is {text!r}, whose home folder is unknown: write the whole path") from error


def _integer(value: object) -> int:
    integer = as_integer(value)
    if integer is None:
        raise PydanticCustomError("integer", "must be a valid integer")
    return integer


def _number(value: object) -> float:
    number = as_number(value)
    if number is None:
        raise PydanticCustomError("number", "must be a valid number")
    return number


Integer = Annotated[int, BeforeValidator(_integer)]
"""A field for everything that `as_integer` accepts."""

Number = Annotated[float, BeforeValidator(_number)]
"""A field for everything that `as_number` accepts."""

UserPath = Annotated[Path, BeforeValidator(_path)]
"""A field for a path; `~` is expanded."""


def problems_of(error: ValidationError, model: type[BaseModel], *, shows_texts: bool = True) -> str:
    """Returns one line that names each invalid setting, what it must be, and its value if that is plain.

    Args:
        error: what pydantic raised.
        model: the class that was validated; its fields are suggested for unknown names.
        shows_texts: False for models of user data, whose texts no message contains.
    """
    shown = (str, bool, int, float, type(None)) if shows_texts else (bool, int, float, type(None))
    problems: list[str] = []
    for problem in error.errors(include_url=False):
        name, value = ".".join(map(str, problem["loc"])), problem["input"]
        if problem["type"] == "extra_forbidden":
            *parents, last = problem["loc"]
            problems.append(f"no setting is named {name!r}{did_you_mean(last, _fields_at(model, parents))}")
        elif problem["type"] == "missing":
            problems.append(f"{name}: is missing")
        elif problem["type"] == "model_type" and not shows_texts:
            problems.append(f"{name}: must be a {problem['ctx']['class_name']}, got a {type(value).__name__}")  # type: ignore[typeddict-item]
        else:
            got = repr(value) if isinstance(value, shown) else f"a {type(value).__name__}"
            ending = "" if problem["type"] == "value_error" else f", got {got}"
            problems.append((f"{name}: " if name else "") + reason_of(problem) + ending)
    return "; ".join(problems)


def reason_of(problem: ErrorDetails) -> str:
    """Returns what an invalid setting must be, in words."""
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a valid dictionary of settings"
    if problem["type"] in ("tuple_type", "list_type"):
        return "must be a list"
    return re.sub(r"^\w+ should ", "must ", problem["msg"].removeprefix("Value error, "))


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Returns a suggestion to append to an error about an unknown name; empty if no name is similar."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> Iterable[str]:
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            return ()
        model = inner
    return model.model_fields


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
