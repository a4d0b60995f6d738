"""Checks of settings: a bad one raises InvalidSpec that names it and its value."""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np

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
    """The value as a float, if it is a finite number within the bounds.

    Raises:
        InvalidSpec: naming owner, setting and value.
    """
    number = number_or_nan(value)
    limits = [(f"> {above}", above), (f">= {at_least}", at_least), (f"<= {at_most}", at_most)]
    wanted = " and ".join(text for text, limit in limits if limit is not None)
    usable = (
        math.isfinite(number)
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (at_most is None or number <= at_most)
    )
    if not usable:
        raise InvalidSpec(f"{owner}: {setting} must be a finite number {wanted}".rstrip() + f", got {value!r}")
    return number


def checked_numbers(owner: str, state: object, key: str) -> dict[str, float]:
    """A mapping of names to finite numbers out of a saved state.

    Raises:
        InvalidSpec: it is missing or something else.
    """
    numbers = cast("Mapping[str, object]", state).get(key) if isinstance(state, Mapping) else None
    if not isinstance(numbers, Mapping):
        raise InvalidSpec(f"{owner}: a saved state must have a mapping {key!r}, got {state!r}")
    named = cast("Mapping[str, object]", numbers)
    return {name: checked_number(owner, f"{key}[{name!r}]", number) for name, number in named.items()}


def number_or_nan(value: object) -> float:
    """The value as a float; NaN if it is no number. Texts and bools are none."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan
