"""The threads of the service: one for the engine, and pairs for files and for large bodies."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class EngineClosing(RuntimeError):
    """The service is stopping; the work is not done."""


class EngineWorker:
    """Runs work on one thread, in the order of submission."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tinkex-engine")

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Queues work; once `stop` has begun, it fails with EngineClosing instead of running."""

        def unless_closing() -> T:
            if self.closing.is_set():
                raise EngineClosing("the service is stopping; this request was not started")
            return work()

        return self._executor.submit(unless_closing)

    async def stop(self) -> None:
        """Ends interruptible work early, drops queued work, and ends the thread."""
        self.closing.set()
        try:
            last = self._executor.submit(lambda: None)
        except RuntimeError:
            return  # the thread has ended already
        await asyncio.shield(asyncio.wrap_future(last))
        self._executor.shutdown(wait=True)


class WorkThreads:
    """Runs work on two threads, so that the event loop never waits for a disk or a large body.

    Args:
        name: prefix of the names of the threads.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix=name)
        self._unfinished: set[Future[Any]] = set()

    async def run(self, work: Callable[[], T]) -> T:
        """Runs work. A cancelled caller returns at once; work that has started finishes.

        Raises:
            EngineClosing: the threads are stopped.
        """
        try:
            future = self._executor.submit(work)
        except RuntimeError as error:
            raise EngineClosing("the service is stopping") from error
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return await asyncio.wrap_future(future)

    async def stop(self) -> None:
        """Waits for submitted work, and ends the threads."""
        unfinished = [asyncio.wrap_future(future) for future in list(self._unfinished)]
        await asyncio.gather(*unfinished, return_exceptions=True)
        self._executor.shutdown(wait=True)
