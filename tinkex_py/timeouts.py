"""The one way to bound a block in time."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def time_limit(seconds: float | None, expired: Callable[[], Exception]) -> AsyncGenerator[asyncio.Timeout]:
    """Bounds a block; whatever ends it once this limit has expired becomes the limit's own error.

    A TimeoutError of something inside, and a cancellation from outside, pass through unchanged.

    Args:
        seconds: from now; None and infinity set no limit.
        expired: makes the error to raise.

    Yields:
        The running limit, whose `reschedule` moves it.
    """
    scope = asyncio.timeout(None if seconds is None or math.isinf(seconds) else seconds)
    try:
        async with scope:
            yield scope
    except Exception as error:
        if not scope.expired():
            raise
        raise expired() from (None if type(error) is TimeoutError else error)
