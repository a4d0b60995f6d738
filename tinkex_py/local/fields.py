"""Kinds of fields in requests, with their limits."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any, cast

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field

MAX_STORED = 1024**2
"""Bytes of JSON of one field that is stored."""
MAX_STOPS = 256
"""Texts or tokens that end a sample, and characters of each of these texts."""
# A hundred years in seconds; calendars end not much later.
_LONGEST_TTL = 36_525 * 86_400


def _storable(value: Any) -> Any:
    """Refuses what is too large, or cannot be stored as UTF-8 or JSON although Python's decoder reads it."""
    size = 0
    try:
        for piece in _STORED.iterencode(value):
            size += len(piece.encode())
            if size > MAX_STORED:
                raise ValueError
    except UnicodeEncodeError:
        raise ValueError("contains half a character (a lone surrogate)") from None
    except ValueError:
        if size > MAX_STORED:
            raise ValueError(f"has more than {MAX_STORED} bytes") from None
        raise ValueError("contains a number that JSON cannot represent (NaN or an infinity)") from None
    return value


_STORED = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def _few(value: Any) -> Any:
    if isinstance(value, list) and len(cast("list[Any]", value)) > MAX_STOPS:
        raise ValueError(f"has more than {MAX_STOPS} items")
    return cast("Any", value)


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is outside of the calendar") from None


Label = Annotated[str, AfterValidator(_storable)]
Metadata = Annotated[dict[str, Any], AfterValidator(_storable)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
SignedNumber = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopText = Annotated[str, Field(max_length=MAX_STOPS)]
AtMostStops = BeforeValidator(_few)
Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]
Seconds = Annotated[int, Field(gt=0, le=_LONGEST_TTL)]
