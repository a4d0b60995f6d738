"""Texts that can be written everywhere.

JSON can escape half a character (a lone surrogate), which has no UTF-8 form: whatever writes one to a file, a terminal
or a socket fails. It becomes U+FFFD, the character that stands for what cannot be read. It is never left out: what
stood on both sides of it would become a text that nobody has checked.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

REPLACED = "\ufffd"
_HALVES = re.compile("[\ud800-\udfff]")


def without_halves(text: str) -> str:
    """The text with every half character replaced."""
    return text if text.isascii() else _HALVES.sub(REPLACED, text)


def with_whole_texts(value: Any) -> Any:
    """A JSON value with every half character in its texts and names replaced; tuples become lists, as in JSON."""
    if isinstance(value, str):
        return without_halves(value)
    if isinstance(value, list | tuple):
        return [with_whole_texts(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, dict):
        return {with_whole_texts(name): with_whole_texts(item) for name, item in cast("dict[Any, Any]", value).items()}
    return value
