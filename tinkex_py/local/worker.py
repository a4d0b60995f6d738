"""The service's threads: one for the engine, and a few for what it keeps on disk."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class EngineClosing(RuntimeError):
    """The service is stopping; what was asked will not be done."""


class EngineWorker:
    """The engine's one thread: work is done one piece at a time, in the order it was handed in.

    It owns the thread from the first piece of work until `stop`.
    """

    def __init__(self) -> None:
        self.closing = threading.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tinkex-engine")

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Queue work; after `stop` began it fails with EngineClosing instead of running."""

        def unless_closing() -> T:
            if self.closing.is_set():
                raise EngineClosing("the service is stopping; this request was not started")
            return work()

        return self._executor.submit(unless_closing)

    async def stop(self) -> None:
        """End the work in progress early where it allows it, drop what is queued, and end the thread."""
        self.closing.set()
        try:
            last = self._executor.submit(_nothing)
        except RuntimeError:
            return  # the thread has ended already
        await asyncio.shield(asyncio.wrap_future(last))
        self._executor.shutdown(wait=True)


class StateThreads:
    """Threads for the state file and the files of checkpoints, so that the event loop never waits for a disk."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tinkex-state")
        self._unfinished: set[Future[Any]] = set()

    async def run(self, work: Callable[[], T]) -> T:
        """Do work in one of the threads. A cancelled caller leaves at once; work that has begun runs to its end.

        Raises:
            EngineClosing: the threads have been stopped.
        """
        try:
            future = self._executor.submit(work)
        except RuntimeError as error:
            raise EngineClosing("the service is stopping") from error
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return await asyncio.wrap_future(future)

    async def stop(self) -> None:
        """Wait for the work there is, and end the threads."""
        unfinished = [asyncio.wrap_future(future) for future in list(self._unfinished)]
        await asyncio.gather(*unfinished, return_exceptions=True)
        self._executor.shutdown(wait=True)


def _nothing() -> None:
    return None
