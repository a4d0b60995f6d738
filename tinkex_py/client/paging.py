"""Listings that page by themselves."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from tinkex_py.errors import InvalidData
from tinkex_py.types.rest import Cursor

Item = TypeVar("Item")
Page = tuple[Sequence[Item], Cursor | None]

DEFAULT_PAGE_SIZE = 100


async def all_items(
    fetch: Callable[[int, int], Awaitable[Page[Item]]], key: Callable[[Item], str], page_size: int
) -> AsyncGenerator[Item, None]:
    """Every item of a listing, once, page after page.

    Something that is added meanwhile moves items to a later page: what was seen is not given again. A service that
    ignores the page, and gives the same items for ever, ends the listing.

    Args:
        fetch: gets one page by limit and offset.
        key: what tells items apart.
        page_size: items per request.
    """
    check_count("page_size", page_size, least=1)
    seen: set[str] = set()
    offset = 0
    while True:
        items, cursor = await fetch(page_size, offset)
        fresh = [item for item in items if key(item) not in seen]
        for item in fresh:
            seen.add(key(item))
            yield item
        offset += len(items)
        if not fresh or is_last(len(items), page_size, offset, cursor):
            return


def is_last(count: int, page_size: int, offset: int, cursor: Cursor | None) -> bool:
    """Whether nothing comes behind a page of `count` items that ends at `offset`."""
    if cursor is not None:
        return offset >= cursor.total_count
    # A service that gives more than was asked for gives everything at once.
    return count != page_size


def check_count(name: str, value: object, *, least: int) -> None:
    """A whole number that is not too small.

    Raises:
        InvalidData: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidData(f"{name} must be an int >= {least}, got {value!r}")
