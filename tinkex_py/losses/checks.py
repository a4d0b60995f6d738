"""Checks of settings. Errors contain the name and the value of a setting."""

import math
import re
from collections.abc import Mapping
from typing import cast

import numpy as np
from pydantic import ValidationError

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidSpec


def checked_number(
    owner: str,
    setting: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """Returns the value as a float.

    Raises:
        InvalidSpec: the value is not a finite number within the bounds.
    """
    number = number_or_nan(value)
    limits = [(f"> {above}", above), (f">= {at_least}", at_least), (f"<= {at_most}", at_most)]
    allowed = " and ".join(text for text, limit in limits if limit is not None)
    usable = (
        math.isfinite(number)
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (at_most is None or number <= at_most)
    )
    if not usable:
        raise InvalidSpec(f"{owner}: {setting} must be a finite number {allowed}".rstrip() + f", got {shown(value)}")
    return number


def first_problem(error: ValidationError) -> str:
    """Returns the first problem of settings that pydantic rejected: name, reason and value."""
    problem = error.errors(include_url=False)[0]
    reason = re.sub("(Input|String) should", "must", problem["msg"])
    if problem["type"] == "string_unicode":
        reason = "must not contain half a character (a lone surrogate)"
    return f"{problem['loc'][0]} {reason}, got {shown(problem['input'])}"


def checked_numbers(owner: str, state: object, key: str) -> dict[str, float]:
    """Returns the mapping of names to finite numbers that a saved state has under a key.

    Raises:
        InvalidSpec: the state has no such mapping.
    """
    numbers = cast("Mapping[str, object]", state).get(key) if isinstance(state, Mapping) else None
    if not isinstance(numbers, Mapping):
        raise InvalidSpec(
            f"{owner}: the saved state must contain a mapping {key!r}, got {shown(cast('object', state))}"
        )
    named = cast("Mapping[str, object]", numbers)
    return {name: checked_number(owner, f"state: {key}[{name!r}]", number) for name, number in named.items()}


def number_or_nan(value: object) -> float:
    """Returns the value as a float, or NaN if it is not a number. Strings and bools are not numbers."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan
