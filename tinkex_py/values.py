"""Fields of models for settings, which read numbers and paths as people write them; and pydantic's errors in words."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, get_args

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from tinkex_py.arguments import as_integer, as_number, check_path, shown
from tinkex_py.errors import did_you_mean


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


def _path(value: object) -> Path:
    return check_path("it", value)


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
    is_shown = (str, bool, int, float, type(None)) if shows_texts else (bool, int, float, type(None))
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
            got = shown(value) if isinstance(value, is_shown) else f"a {type(value).__name__}"
            ending = "" if problem["type"] == "value_error" else f", got {got}"
            problems.append((f"{name}: " if name else "") + reason_of(problem) + ending)
    return "; ".join(problems)


def reason_of(problem: ErrorDetails) -> str:
    """Returns what an invalid setting must be, in words."""
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a valid dictionary of settings"
    if problem["type"] == "string_unicode":
        return "must not contain half a character (a lone surrogate)"
    if problem["type"] in ("tuple_type", "list_type"):
        return "must be a list"
    return re.sub(r"^\w+ should ", "must ", problem["msg"].removeprefix("Value error, "))


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
