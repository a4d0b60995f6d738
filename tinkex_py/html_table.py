"""Small HTML tables for notebooks. All content is escaped."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from reprlib import Repr

from tinkex_py.unicode import plain_text

_SHORT = Repr()
_SHORT.maxother = _SHORT.maxstring = 80


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, below: str = "") -> str:
    """Returns a table with a title.

    Args:
        title: text above the table.
        columns: headings; a column without any value is omitted.
        rows: cells, one per column; None is empty, strings are shown unchanged, floats with five digits.
        below: a line below the table.
    """
    cells = [list(row) for row in rows]
    shown = [index for index in range(len(columns)) if any(row[index] is not None for row in cells)]
    head = "".join(_cell("th", columns[index]) for index in shown)
    body = "".join(f"<tr>{''.join(_cell('td', row[index]) for index in shown)}</tr>" for row in cells)
    note = f"<p>{_text(below)}</p>" if below else ""
    return (
        f"<div><p><strong>{_text(title)}</strong></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}</div>"
    )


def html_facts(title: str, facts: Mapping[str, object]) -> str:
    """Returns a table of names and values; values that are None are omitted."""
    return html_table(title, ("", "value"), [(name, value) for name, value in facts.items() if value is not None])


def as_text(value: object) -> str:
    """Returns the text of a cell."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else str(value)
    if isinstance(value, bool | int):
        return str(value)
    return _SHORT.repr(value)


def _cell(kind: str, value: object) -> str:
    side = "right" if isinstance(value, int | float) and not isinstance(value, bool) else "left"
    return f'<{kind} style="text-align: {side}">{_text(as_text(value))}</{kind}>'


def _text(text: str) -> str:
    return escape(plain_text(text))
