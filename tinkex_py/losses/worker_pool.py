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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, cast

from tinkex_py.errors import ClientClosed
from tinkex_py.limits import time_limit


class Permit:
    """A unit of a `Limiter`, waited for or held.

    Attributes:
        abandoned: its holder still runs, although its caller has left.
    """

    def __init__(self, limiter: "Limiter", holder: str, group: object, group_limit: int) -> None:
        self.abandoned = False
        self.holder = holder
        self.group = group
        self.group_limit = group_limit
        self._limiter = limiter
        self._waiting: tuple[asyncio.AbstractEventLoop, int, asyncio.Event] | None = None

    def release(self) -> None:
        """Gives it back, from any thread; a second call does nothing."""
        self._limiter.release(self)

    def abandon(self) -> None:
        """Marks it as abandoned, unless it was given back already."""
        self._limiter.abandon(self)

    def wait(self) -> asyncio.Event:
        """Makes the event that `wake` sets, on the loop that waits."""
        changed = asyncio.Event()
        self._waiting = asyncio.get_running_loop(), threading.get_ident(), changed
        return changed

    def wake(self) -> bool:
        """Sets that event, from any thread; False if its loop is closed."""
        assert self._waiting is not None, "only a permit that is waited for is woken"
        loop, thread, changed = self._waiting
        if thread == threading.get_ident() and loop.is_running():
            changed.set()
            return True
        try:
            loop.call_soon_threadsafe(changed.set)
        except RuntimeError:
            return False
        return True


class Limiter:
    """A semaphore whose permits can be released from any thread, and which knows who holds them.

    Args:
        limit: permits in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held: list[Permit] = []
        self._queue: list[Permit] = []

    async def acquire(
        self, holder: str, *, group: object = None, group_limit: int | None = None, patience: float | None = None
    ) -> Permit:
        """Waits for a permit.

        Args:
            holder: who asks, for messages.
            group: what the permit is for; those of a group count against its own limit too.
            group_limit: most permits that the group may hold; None is the limit of all.
            patience: seconds to wait while every permit in the way is abandoned; None waits for ever.

        Raises:
            TimeoutError: patience ran out.
        """
        permit = Permit(self, holder, group, group_limit or self.limit)
        with self._lock:
            if not self._queue and not self._in_the_way(permit):
                self._held.append(permit)
                return permit
            changed = permit.wait()
            self._queue.append(permit)
            self._look_again(permit)
        try:
            await self._granted(permit, changed, patience)
        except BaseException:
            permit.release()
            raise
        return permit

    async def _granted(self, permit: Permit, changed: asyncio.Event, patience: float | None) -> None:
        loop = asyncio.get_running_loop()
        give_up_at: float | None = None
        while True:
            changed.clear()
            with self._lock:
                if permit in self._held:
                    return
                stalled = all(held.abandoned for held in self._in_the_way(permit))
            if not stalled or patience is None:
                give_up_at = None
                await changed.wait()
                continue
            give_up_at = give_up_at or loop.time() + patience
            async with time_limit(give_up_at - loop.time(), TimeoutError):
                await changed.wait()

    def release(self, permit: Permit) -> None:
        """See `Permit.release`."""
        with self._lock:
            for permits in (self._held, self._queue):
                if permit in permits:
                    permits.remove(permit)
            if self._queue:
                self._look_again(permit)

    def abandon(self, permit: Permit) -> None:
        """See `Permit.abandon`."""
        with self._lock:
            permit.abandoned = permit in self._held
            self._look_again(permit)

    def holders(self) -> list[str]:
        """Names of all holders."""
        with self._lock:
            return [permit.holder for permit in self._held]

    def abandoned(self) -> list[str]:
        """Names of the holders that were abandoned and still run."""
        with self._lock:
            return [permit.holder for permit in self._held if permit.abandoned]

    def _look_again(self, changed: Permit) -> None:
        """Hands out what is free. Where permits are abandoned, those that still wait look whether that stalls them."""
        for permit in list(self._queue):
            if len(self._held) >= self.limit:
                break
            if not self._in_the_way(permit):
                self._queue.remove(permit)
                if permit.wake():
                    self._held.append(permit)
        if any(permit.abandoned for permit in (*self._held, changed)):
            self._queue = [permit for permit in self._queue if permit.wake()]

    def _in_the_way(self, permit: Permit) -> Sequence[Permit]:
        """The held permits that keep this one waiting."""
        if len(self._held) >= self.limit:
            return self._held
        if len(self._held) < permit.group_limit:
            return ()
        own = [held for held in self._held if held.group is permit.group]
        return own if len(own) >= permit.group_limit else ()


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
