"""Rows as people have them: tables of `datasets` and pandas, parquet, JSON."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from tinkex_py.errors import InvalidData
from tinkex_py.text import require_text


def plain_rows(rows: Iterable[Any]) -> Iterator[Any]:
    """Yields rows as plain Python values.

    Tables of Arrow (`datasets`, parquet) give every row all fields, and fill those that a row does not have with None,
    at every depth. In rows of a `datasets` table, such fields are removed.

    Raises:
        InvalidData: `rows` is not a sequence of rows, such as a DatasetDict, which maps names of splits to them.
    """
    kind = type(cast("object", rows))
    if issubclass(kind, Mapping):
        names = ", ".join(map(repr, rows))
        raise InvalidData(f"rows must be the rows of one split, got a {kind.__name__} of {names}: pass rows[NAME]")
    if issubclass(kind, str | bytes) or not issubclass(kind, Iterable):
        raise InvalidData(f"rows must be an iterable of rows, got a {kind.__name__}: pass a list or a dataset")
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        raise InvalidData('rows is a data frame, whose elements are its columns: pass rows.to_dict("records")')
    is_table = kind.__module__.partition(".")[0] == "datasets"
    return map(without_nulls, rows) if is_table else iter(rows)


def plain_messages(messages: object) -> object:
    """Returns messages as plain Python values: arrays and numbers of numpy become lists and numbers.

    Fields of a message that are None are removed. If all messages have the same fields, and some are None, they come
    from a table, and fields inside them that are None are removed as well, at every depth. Otherwise a null inside of a
    message, such as in the arguments of a tool call, was written by the user and stays.
    """
    plain = _plain(messages)
    if not isinstance(plain, list) or not all(isinstance(message, dict) for message in cast("list[object]", plain)):
        return cast("object", plain)
    rows = cast("list[dict[str, Any]]", plain)
    fields = {frozenset(row) for row in rows}
    is_table = len(fields) == 1 and any(value is None for row in rows for value in row.values())
    return [without_nulls(row) if is_table else _without_none(row) for row in rows]


def without_nulls(value: Any) -> Any:
    """Returns the value without fields of mappings that are None, at every depth."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in _without_none(cast("Mapping[Any, Any]", value)).items()}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in cast("Sequence[Any]", value)]
    return value


def require_texts(value: object, name: str) -> None:
    """Checks the strings in a value, at every depth.

    Raises:
        InvalidData: one contains half a character; the message has the path to it.
    """
    if isinstance(value, str):
        require_text(name, value)
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            require_texts(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast("Sequence[object]", value)):
            require_texts(item, f"{name}[{index}]")


def conversation(prompt: Sequence[Any], answer: Sequence[Any]) -> list[Any]:
    """Returns the messages of a prompt and an answer, where the answer may repeat the prompt.

    Raises:
        InvalidData: the answer begins another conversation than the prompt.
    """
    before, after = [*prompt], [*answer]
    if after[: len(before)] == before:
        return after
    roles = [cast("Mapping[str, object]", message).get("role") for message in (before[-1:] + after[:1])]
    if roles in (["user", "user"], ["user", "system"], ["system", "system"]):
        raise InvalidData(
            "the answer is a whole conversation that does not begin with the prompt: pass it without prompt=, or only "
            "the messages after the prompt"
        )
    return [*before, *after]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return _plain(cast("Any", value).tolist())
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value


def _without_none(row: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in row.items() if value is not None}
