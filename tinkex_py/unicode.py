"""Finds and replaces lone surrogates, so that strings can be written to files, terminals and sockets.

JSON can escape a lone surrogate (half of a UTF-16 pair), which UTF-8 cannot encode. It becomes U+FFFD, the replacement
character. It is never removed: joining the text around it could form a string that passed no check.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

REPLACED = "\ufffd"
_HALVES = re.compile("[\ud800-\udfff]")


def half_at(text: str) -> int | None:
    """Returns the position of the first lone surrogate; None if there is none."""
    found = None if text.isascii() else _HALVES.search(text)
    return None if found is None else found.start()


def without_halves(text: str) -> str:
    """Returns the text with every lone surrogate replaced."""
    return text if text.isascii() else _HALVES.sub(REPLACED, text)


def with_whole_texts(value: Any) -> Any:
    """Returns a JSON value with every lone surrogate in its strings and keys replaced; tuples become lists."""
    if isinstance(value, str):
        return without_halves(value)
    if isinstance(value, list | tuple):
        return [with_whole_texts(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, dict):
        return {with_whole_texts(name): with_whole_texts(item) for name, item in cast("dict[Any, Any]", value).items()}
    return value
