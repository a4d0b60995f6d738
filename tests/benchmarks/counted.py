"""Work for a subject's process that needs nothing but Python."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def counted(start: int) -> AsyncGenerator[Callable[[], Awaitable[int]]]:
    """Tells how often it ran, counted from `start`."""
    count = start

    async def work() -> int:
        nonlocal count
        count += 1
        return count

    yield work
