"""Worker threads: bounded and abandonable ones for terms, others for this package's own arithmetic.

Python cannot stop a thread. A term that outlives its timeout is abandoned: its caller goes on, its late result is
dropped, and it keeps its permit until its function has returned. So there are never more live term threads than
permits, however many terms time out. The process waits for abandoned threads when it ends.
"""

import asyncio
import contextvars
import inspect
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, cast

from tinkex_py.errors import ClientClosed
from tinkex_py.losses.limiter import Limiter, Permit

Result = TypeVar("Result")

# Some of this work waits for files; the rest must not wait for it.
_LEAST_ARITHMETIC = 4


def usable_cpu_count() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_alone() -> None:
    """Lets torch use no further threads for what this thread computes.

    There is a worker for each CPU. If each of them had torch's own threads too, they would take the CPUs from each
    other, and wait for each other spinning.
    """
    import torch

    usual = torch.get_num_threads()
    if usual == 1:
        return
    torch.set_num_threads(1)
    # Torch applies that to all threads that start later, too; set again from another thread, the usual number does.
    restoring = threading.Thread(target=torch.set_num_threads, args=(usual,), name="tinkex-restore")
    restoring.start()
    restoring.join()


class _Call(Generic[Result]):
    """Work that runs once, and its outcome, taken once.

    Neither is kept after that: both hold the logprobs, which must not live as long as an idle thread. An outcome is no
    exception of the future, because asyncio translates some exceptions and refuses others.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work
        self._result: Result | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        work, self._work = self._work, None
        assert work is not None, "a call runs once"
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001  # raised where the result is awaited
            self._error = error

    def take(self) -> Result:
        result, self._result = self._result, None
        error, self._error = self._error, None
        if error is None:
            return cast("Result", result)
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    def drop(self) -> None:
        """Forgets the outcome, after its caller has left."""
        result, self._result, self._error = self._result, None, None
        if inspect.iscoroutine(result):
            result.close()


class WorkerPool:
    """The threads of one service client, or of one pipeline.

    Args:
        max_threads: most live term threads; None is the usable CPU count.

    Attributes:
        limiter: its permits are the term threads.
    """

    def __init__(self, max_threads: int | None = None) -> None:
        limit = max_threads or usable_cpu_count()
        self.limiter = Limiter(limit)
        self._unfinished: set[Future[None]] = set()
        self._left: dict[Future[None], str] = {}  # unbounded calls whose callers have left
        # Threads start when they are needed. A coroutine that holds its permit must never wait for a thread whose
        # term waits for a permit, and no sum for a backward pass that hangs in a user's code: so each has its own.
        alone = compute_alone if limit > 1 else None
        self._terms = ThreadPoolExecutor(limit, "tinkex-term", alone)
        self._unbounded = ThreadPoolExecutor(limit, "tinkex-unbounded", alone)
        self._arithmetic = ThreadPoolExecutor(max(limit, _LEAST_ARITHMETIC), "tinkex-arithmetic", compute_alone)

    async def call_term(self, name: str, work: Callable[[], Result], thread: Permit, permit: Permit) -> Result:
        """Runs a term's function.

        Args:
            name: of the term.
            work: calls it.
            thread: the permit of `limiter` that the term holds.
            permit: the other one that it holds. Releasing both stays with the caller, unless that leaves while the
                function runs: then they are abandoned, and released when it has returned.

        Raises:
            ClientClosed: the pool was closed.
        """

        def left(future: Future[None]) -> None:
            for held in (thread, permit):
                held.abandon()
                future.add_done_callback(lambda _, held=held: held.release())

        return await self._run(self._terms, name, work, left)

    async def call_unbounded(self, name: str, work: Callable[[], Result]) -> Result:
        """Runs what may be a user's code, but needs no permit: the backward pass of a coroutine term, which has one.

        Raises:
            ClientClosed: the pool was closed.
        """

        def left(future: Future[None]) -> None:
            self._left[future] = name
            future.add_done_callback(self._left.pop)

        return await self._run(self._unbounded, name, work, left)

    async def compute(self, name: str, work: Callable[[], Result]) -> Result:
        """Runs arithmetic or encoding of this package, never a user's code. It waits for no term.

        Raises:
            ClientClosed: the pool was closed.
        """
        return await self._run(self._arithmetic, name, work, lambda _: None)

    def abandoned(self) -> list[str]:
        """Names of the terms whose threads outlived them."""
        return [*self.limiter.abandoned(), *self._left.values()]

    def close(self) -> None:
        """Ends the threads: at once if all are idle, else each when its work has ended."""
        for executor in (self._terms, self._unbounded, self._arithmetic):
            executor.shutdown(wait=not self._unfinished)

    async def _run(
        self,
        executor: ThreadPoolExecutor,
        name: str,
        work: Callable[[], Result],
        left: "Callable[[Future[None]], None]",
    ) -> Result:
        """The result of work in a thread; `left` is called where the caller leaves while it runs."""
        call = _Call(work)
        try:
            future: Future[None] = executor.submit(contextvars.copy_context().run, call.run)
        except RuntimeError as error:
            raise ClientClosed(f"{name!r} cannot run: its worker pool takes no more work ({error})") from error
        self._unfinished.add(future)
        try:
            await asyncio.wrap_future(future)
        except BaseException:
            if not future.cancel() and not future.done():
                left(future)
            future.add_done_callback(self._unfinished.discard)
            future.add_done_callback(lambda _: call.drop())
            raise
        self._unfinished.discard(future)
        return call.take()
