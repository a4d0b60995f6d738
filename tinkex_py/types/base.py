"""Base class of the values that users create: frozen; validation errors are raised as InvalidData."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidData


class WireModel(BaseModel):
    """A frozen value whose fields have the names of the wire format.

    Raises:
        InvalidData: a field is invalid; the message names it and, if it is a number, its value.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
            return
        except ValidationError as error:
            problems = described(error)
        except TypeError as error:  # a mapping that is given for a nested value lacks a field, or has an unknown one
            problems = f"{', '.join(fields)}: {error}"
        # Raised outside of the except block, because pydantic's error contains the input, which may be a prompt.
        raise InvalidData(f"{type(self).__name__}: {problems}")


def described(error: ValidationError) -> str:
    """Returns every invalid field with its problem and, if it is a number, its value."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        place = _path(item["loc"])
        value = item["input"]
        seen = shown(value) if isinstance(value, bool | int | float | None) else f"a {type(value).__name__}"
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{place}{message} (got {seen})" if item["type"] != "value_error" else f"{place}{message}")
    return "; ".join(lines)


def _path(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location) + ": " if location else ""
