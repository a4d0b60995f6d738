"""Threads for blocking work other than terms and arithmetic: files, certificate stores, downloads by libraries."""

import asyncio
import contextlib
import contextvars
import importlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def import_before_threads(package: str) -> None:
    """Imports a package on the thread of the event loop; an error is left to its first use.

    `transformers` replaces its module in `sys.modules` while it is imported, and an import statement that meanwhile
    runs in another thread gets the replaced module, which has no names. On the thread of the event loop, no import
    of the program can run meanwhile. If one runs in another thread already, `import_module` waits, and then looks the
    module up again.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module(package)


async def in_own_thread(name: str, work: Callable[[], Result]) -> Result:
    """Runs a function in its own thread. Cancelling the caller returns at once; the function runs to its end.

    Args:
        name: name of the thread.
        work: the function.

    Returns:
        The function's result.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    try:
        context = contextvars.copy_context()
        return await asyncio.wrap_future(executor.submit(context.run, work))
    finally:
        executor.shutdown(wait=False)


class Stopped(Exception):
    """Ends file work whose caller was cancelled; internal to this package."""


class FileThread:
    """One thread for file work. A cancelled caller returns only when the running function has ended.

    Use it with `async with`.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str = "tinkex-files") -> None:
        self._stopping = threading.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def __aenter__(self) -> "FileThread":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._executor.shutdown(wait=True)

    def check(self) -> None:
        """Ends the function that calls it, from the thread, if the caller was cancelled.

        Raises:
            Stopped: the caller was cancelled.
        """
        if self._stopping.is_set():
            raise Stopped

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs a function in the thread and returns its result."""
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
