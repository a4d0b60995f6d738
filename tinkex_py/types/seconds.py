"""Times as users give them."""

import math
from typing import TypeGuard


def is_seconds(value: object) -> TypeGuard[int | float]:
    """True for an int or float that a clock can count, infinity included: no bool, no NaN, no int beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        number = float(value)
    except OverflowError:
        return False
    return not math.isnan(number)
