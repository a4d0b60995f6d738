"""All that commands print: text, JSON, tables and listings.

Text from a service, a recorded step or a run cannot control the terminal.
"""

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from tinkex_py.unicode import plain_json, plain_line, plain_text

if TYPE_CHECKING:
    from pydantic import BaseModel

Item = TypeVar("Item", bound="BaseModel")

PAGE_SIZE = 100  # items per request
_WIDE = 400  # columns; rows in a pipe are not folded


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Prints text for people."""
    typer.echo(plain_text(text), err=err, nl=nl)


def echo_json(value: "BaseModel | Mapping[str, Any]") -> None:
    """Prints a value as one line of JSON."""
    typer.echo(plain_json(json.dumps(value) if isinstance(value, Mapping) else value.model_dump_json()))


async def show_listing(
    items: AsyncGenerator[Item, None],
    columns: Sequence[str],
    row: Callable[[Item], Sequence[object]],
    *,
    limit: int,
    as_json: bool,
    nothing: str,
) -> None:
    """Prints at most `limit` items (0 for all), as lines of JSON while they arrive, or together as a table."""
    rows: list[Sequence[object]] = []
    count, more = 0, False
    async with aclosing(items) as found:
        async for item in found:
            if limit and count == limit:
                more = True
                break
            count += 1
            if as_json:
                echo_json(item)
            else:
                rows.append(row(item))
    if rows:
        show_table(columns, rows)
    elif not as_json:
        echo(nothing, err=True)
    if more:
        echo(f"only the first {limit} are shown: use --limit 0 to list all", err=True)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table, whose cells are not truncated; None is an empty cell."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell_text(value)) for value in row))
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(table)


def cell_text(value: Any) -> str:
    """Returns a value as one line of printable characters."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S %Z")
    return plain_line(str(value))


def size_text(count: int | None) -> str | None:
    """Returns a number of bytes in the largest unit that gives at least 1."""
    if count is None or count < 1024:
        return None if count is None else f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"
