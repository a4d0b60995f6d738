"""Work off the event loop that is neither a term nor arithmetic: files, certificate stores, downloads by libraries."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


async def in_own_thread(name: str, work: Callable[[], Result]) -> Result:
    """Runs work in a thread that ends with it. A cancelled caller leaves at once; the work goes on to its end.

    Args:
        name: of the thread.
        work: what to run.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    try:
        context = contextvars.copy_context()
        return await asyncio.wrap_future(executor.submit(context.run, work))
    finally:
        executor.shutdown(wait=False)


class Stopped(Exception):
    """Ends file work whose caller was cancelled; never leaves this package."""


class FileThread:
    """Runs one piece of work at a time. A cancelled caller leaves when the work in hand has ended, not before.

    Use it with `async with`.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str = "tinkex-files") -> None:
        self._stopping = threading.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def __aenter__(self) -> "FileThread":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._executor.shutdown(wait=True)

    def check(self) -> None:
        """Called by long work, from the thread.

        Raises:
            Stopped: the caller was cancelled.
        """
        if self._stopping.is_set():
            raise Stopped

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs work in the thread."""
        future = asyncio.wrap_future(self._executor.submit(work))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._stopping.set()
            await _ended(future)
            self._stopping.clear()
            raise


async def _ended(future: "asyncio.Future[Result]") -> None:
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue  # the caller raises the first cancellation as soon as the work has ended
    if not future.cancelled():
        future.exception()
