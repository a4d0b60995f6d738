"""Texts of others, as they can be written to files, terminals and sockets.

Characters that steer a terminal or the direction of the text around them become U+FFFD, the replacement character, or
an escape in JSON. So does a lone surrogate (half of a UTF-16 pair), which JSON can escape and UTF-8 cannot encode.
Nothing is removed: joining the text around it could form a string that passed no check.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

REPLACED = "\ufffd"
_HALVES = re.compile("[\ud800-\udfff]")
# Controls (C0 without tab and line feed, delete, C1), separators of lines and paragraphs, marks and overrides of the
# direction, and lone surrogates.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_STEERING = re.compile(f"[{_CONTROLS}]")
_STEERING_A_LINE = re.compile(f"[\t\n{_CONTROLS}]")


def half_at(text: str) -> int | None:
    """Returns the position of the first lone surrogate; None if there is none."""
    found = None if text.isascii() else _HALVES.search(text)
    return None if found is None else found.start()


def without_halves(text: str) -> str:
    """Returns the text with every lone surrogate replaced."""
    return text if text.isascii() else _HALVES.sub(REPLACED, text)


def plain_text(text: str) -> str:
    """Returns the text with terminal controls and direction overrides replaced; tabs and line feeds stay."""
    return text if text.isprintable() else _STEERING.sub(REPLACED, text)


def plain_line(text: str) -> str:
    """Returns the text as one line, with terminal controls and direction overrides replaced."""
    return text if text.isprintable() else _STEERING_A_LINE.sub(REPLACED, text)


def plain_json(text: str) -> str:
    """Returns a JSON document with such characters escaped, so that it is one line for every reader of lines."""
    return text if text.isprintable() else _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def with_whole_texts(value: Any, whole: Callable[[str], str] = without_halves) -> Any:
    """Returns a JSON value with every lone surrogate in its strings and keys replaced; tuples become lists.

    Args:
        value: the value.
        whole: replaces them in one string; `plain_text` or `plain_line` replace more.
    """
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list | tuple):
        return [with_whole_texts(item, whole) for item in cast("Sequence[Any]", value)]
    if isinstance(value, dict):
        fields = cast("dict[Any, Any]", value).items()
        return {with_whole_texts(name, whole): with_whole_texts(item, whole) for name, item in fields}
    return value
