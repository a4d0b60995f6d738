"""Listings of a service, as a table or as lines of JSON."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

import typer
from pydantic import BaseModel

from tinkex_py.commands.common.tables import show_table

Item = TypeVar("Item", bound=BaseModel)

PAGE_SIZE = 100
"""Items per request."""


async def show_listing(
    items: AsyncGenerator[Item, None],
    columns: Sequence[str],
    row: Callable[[Item], Sequence[object]],
    *,
    limit: int,
    as_json: bool,
    nothing: str,
) -> None:
    """Prints items as they come in, one line of JSON each, or all of them as a table.

    Args:
        items: closed at the end.
        columns: titles of the table's columns.
        row: what stands in them for one item.
        limit: at most so many; 0 for all.
        as_json: whether lines of JSON are wanted.
        nothing: what a table without rows says.
    """
    rows: list[Sequence[object]] = []
    count, more = 0, False
    async with aclosing(items) as found:
        async for item in found:
            if limit and count == limit:
                more = True
                break
            count += 1
            if as_json:
                typer.echo(item.model_dump_json())
            else:
                rows.append(row(item))
    if rows:
        show_table(columns, rows)
    elif not as_json:
        typer.echo(nothing, err=True)
    if more:
        typer.echo(f"there are more than {limit}: --limit 0 lists all", err=True)
