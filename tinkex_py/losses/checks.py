"""Checks of settings. Errors contain the name and the value of a setting."""

import math
from collections.abc import Mapping
from typing import cast

from pydantic import ValidationError

from tinkex_py.arguments import as_integer, as_number, shown
from tinkex_py.errors import InvalidSpec
from tinkex_py.values import reason_of


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


def checked_steps(owner: str, setting: str, value: object, *, at_least: int) -> int:
    """Returns the value as an int.

    Raises:
        InvalidSpec: the value is not an integer, or less than `at_least`.
    """
    steps = as_integer(value)
    if steps is None or steps < at_least:
        raise InvalidSpec(f"{owner}: {setting} must be an int >= {at_least}, got {shown(value)}")
    return steps


def first_problem(error: ValidationError) -> str:
    """Returns the first problem of settings that pydantic rejected: name, reason and value."""
    problem = error.errors(include_url=False)[0]
    return f"{problem['loc'][0]} {reason_of(problem)}, got {shown(problem['input'])}"


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


def saved_steps(owner: str, state: object, key: str) -> int:
    """Returns the number of steps that a saved state has under a key.

    Raises:
        InvalidSpec: the state has no such number.
    """
    value = cast("Mapping[str, object]", state).get(key) if isinstance(state, Mapping) else None
    return checked_steps(owner, f"state: {key}", value, at_least=0)


def number_or_nan(value: object) -> float:
    """Returns the value as a float, or NaN if it is not a number. Strings and bools are not numbers."""
    number = as_number(value)
    return math.nan if number is None else number
