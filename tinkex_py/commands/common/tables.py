"""Tables for people: nothing is cut off, and nothing that a service says can steer the terminal."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Where nobody looks, such as in a pipe, rows are not folded.
_WIDE = 400


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; a value that is None is an empty cell."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell_text(value)) for value in row))
    console().print(table)


def console() -> Console:
    """What a command prints to."""
    made = Console()
    return made if made.is_terminal else Console(width=_WIDE)


def cell_text(value: Any) -> str:
    """A value as one line."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S %Z")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value))


def size_text(count: int | None) -> str | None:
    """Bytes in the largest unit that leaves at least one."""
    if count is None:
        return None
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, _ = size / 1024, units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
