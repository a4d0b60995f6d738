"""Workers: bounded pools of threads and processes for terms, and threads for the arithmetic of this package.

Python cannot stop a thread. A term that exceeds its timeout is abandoned: its caller continues, its result is
dropped, and it keeps its permit until its function returns. Therefore the number of live term threads never exceeds
the number of permits. The process waits for abandoned threads at exit.
"""

import asyncio
import contextvars
import functools
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from tinkex_py.errors import ClientClosed
from tinkex_py.limits import time_limit
from tinkex_py.processes.pool import ProcessPool


@dataclass(eq=False)
class Permit:
    """A permit of a `Limiter`, queued or held.

    Attributes:
        limiter: the limiter.
        holder: name of the holder.
        group: permits of the same group share `group_limit`.
        group_limit: maximum number of permits of the group.
        abandoned: whether its holder still runs after its caller left.
    """

    limiter: "Limiter"
    holder: str
    group: object
    group_limit: int
    abandoned: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Releases the permit, from any thread. A second call has no effect."""
        self.limiter.release(self)

    async def wait(self) -> None:
        """Waits for `wake`."""
        await self._changed.wait()
        self._changed.clear()

    def wake(self) -> bool:
        """Ends `wait`, from any thread. Returns False if the event loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:
            return False
        return True


class Limiter:
    """A semaphore with named holders whose permits can be released from any thread.

    Args:
        limit: number of permits.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held: list[Permit] = []
        self._queue: list[Permit] = []

    async def acquire(
        self, holder: str, *, group: object = None, group_limit: int | None = None, patience: float | None = None
    ) -> Permit:
        """Waits for a permit; see `Permit` for the arguments.

        Raises:
            TimeoutError: all blocking permits were abandoned for `patience` seconds.
        """
        permit = Permit(self, holder, group, group_limit or self.limit)
        with self._lock:
            if not self._queue and not self._in_the_way(permit):
                self._held.append(permit)
                return permit
            self._queue.append(permit)
            self._look_again(permit)
        try:
            await self._granted(permit, patience)
        except BaseException:
            permit.release()
            raise
        return permit

    async def _granted(self, permit: Permit, patience: float | None) -> None:
        loop = asyncio.get_running_loop()
        give_up_at: float | None = None
        while True:
            with self._lock:
                if permit in self._held:
                    return
                stalled = all(held.abandoned for held in self._in_the_way(permit))
            if not stalled or patience is None:
                give_up_at = None
                await permit.wait()
                continue
            give_up_at = give_up_at or loop.time() + patience
            async with time_limit(give_up_at - loop.time(), TimeoutError):
                await permit.wait()

    def release(self, permit: Permit) -> None:
        """Releases the permit."""
        with self._lock:
            for permits in (self._held, self._queue):
                if permit in permits:
                    permits.remove(permit)
            if self._queue:
                self._look_again(permit)

    def abandon(self, permit: Permit) -> None:
        """Marks the permit as abandoned unless it was released."""
        with self._lock:
            permit.abandoned = permit in self._held
            self._look_again(permit)

    def holders(self) -> list[str]:
        """Returns the names of all holders."""
        with self._lock:
            return [permit.holder for permit in self._held]

    def abandoned(self) -> list[str]:
        """Returns the names of the abandoned holders that still run."""
        with self._lock:
            return [permit.holder for permit in self._held if permit.abandoned]

    def _look_again(self, changed: Permit) -> None:
        """Grants free permits in order. If permits are abandoned, wakes the rest of the queue to check for a stall."""
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
        """Returns the held permits that block this one."""
        if len(self._held) >= self.limit:
            return self._held
        if len(self._held) < permit.group_limit:
            return ()
        own = [held for held in self._held if held.group is permit.group]
        return own if len(own) >= permit.group_limit else ()


Result = TypeVar("Result")

# Work that waits for files must not block the rest.
_LEAST_ARITHMETIC = 4


def usable_cpu_count() -> int:
    """Returns the number of CPUs that this process can use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_alone() -> None:
    """Limits torch to one thread for the computations of the calling thread.

    There is one worker per CPU. With additional torch threads per worker they would compete for the CPUs and spin
    while they wait for each other.
    """
    import torch

    usual = torch.get_num_threads()
    if usual == 1:
        return
    torch.set_num_threads(1)
    # Torch applies this to threads that start later, too. Setting it from another thread restores it for those.
    restoring = threading.Thread(target=torch.set_num_threads, args=(usual,), name="tinkex-restore")
    restoring.start()
    restoring.join()


def _outcome(work: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    """Returns result and exception, because asyncio translates some exceptions of futures and rejects others."""
    try:
        return work(), None
    except BaseException as error:  # noqa: BLE001  # raised where the result is awaited
        return None, error


def _close_coroutine(future: "Future[tuple[Any, BaseException | None]]") -> None:
    """Closes a coroutine that a term returned after its caller left."""
    result = None if future.cancelled() else future.result()[0]
    if inspect.iscoroutine(result):
        result.close()


class WorkerPool:
    """The worker threads of a service client or a pipeline.

    Args:
        max_threads: maximum number of live term threads; None means the number of usable CPUs.
        max_processes: maximum number of worker processes; None means the number of usable CPUs.

    Attributes:
        limiter: limiter of the term threads.
        process_limiter: limiter of the terms in processes.
    """

    def __init__(self, max_threads: int | None = None, max_processes: int | None = None) -> None:
        limit = max_threads or usable_cpu_count()
        self.limiter = Limiter(limit)
        self.process_limiter = Limiter(max_processes or usable_cpu_count())
        self._computes_alone = limit > 1
        self._unfinished: set[Future[Any]] = set()
        self._left: dict[Future[Any], str] = {}  # unbounded calls whose callers left
        # Separate executors prevent deadlocks: a coroutine that holds a permit must not wait for a thread whose term
        # waits for a permit, and arithmetic must not wait for a backward pass that hangs in user code.
        alone = compute_alone if self._computes_alone else None
        self._terms = ThreadPoolExecutor(limit, "tinkex-term", alone)
        self._unbounded = ThreadPoolExecutor(limit, "tinkex-unbounded", alone)
        self._arithmetic = ThreadPoolExecutor(max(limit, _LEAST_ARITHMETIC), "tinkex-arithmetic", compute_alone)

    @functools.cached_property
    def processes(self) -> ProcessPool:
        """The worker processes; none starts before it is needed."""
        return ProcessPool(self.process_limiter.limit, "tinkex_py.losses.in_worker:evaluate_job")

    def torch_threads(self) -> int:
        """Returns the number of torch threads for a term, in a thread or a process."""
        import torch

        return 1 if self._computes_alone else torch.get_num_threads()

    async def call_term(self, name: str, work: Callable[[], Result], thread: Permit, permit: Permit) -> Result:
        """Runs the function of a term.

        Args:
            name: name of the term.
            work: calls the function.
            thread: the permit of `limiter` that the term holds.
            permit: the other permit that it holds. The caller releases both, unless it leaves while the function
                runs: then both are marked as abandoned and are released when the function returns.

        Raises:
            ClientClosed: the pool was closed.
        """

        def left(future: Future[Any]) -> None:
            for held in (thread, permit):
                held.limiter.abandon(held)
                future.add_done_callback(lambda _, held=held: held.release())

        return await self._run(self._terms, name, work, left)

    async def call_unbounded(self, name: str, work: Callable[[], Result]) -> Result:
        """Runs user code that needs no further permit, such as the backward pass of a coroutine term.

        Raises:
            ClientClosed: the pool was closed.
        """

        def left(future: Future[Any]) -> None:
            self._left[future] = name
            future.add_done_callback(self._left.pop)

        return await self._run(self._unbounded, name, work, left)

    async def compute(self, name: str, work: Callable[[], Result]) -> Result:
        """Runs arithmetic or encoding of this package, never user code. It does not wait for terms.

        Raises:
            ClientClosed: the pool was closed.
        """
        return await self._run(self._arithmetic, name, work, lambda _: None)

    def abandoned(self) -> list[str]:
        """Returns the names of abandoned terms whose threads still run."""
        return [*self.limiter.abandoned(), *self._left.values()]

    def close(self) -> None:
        """Stops the threads and processes. Busy threads end after their work, without blocking this call."""
        if "processes" in vars(self):
            self.processes.close()
        for executor in (self._terms, self._unbounded, self._arithmetic):
            executor.shutdown(wait=not self._unfinished)

    async def _run(
        self,
        executor: ThreadPoolExecutor,
        name: str,
        work: Callable[[], Result],
        left: "Callable[[Future[Any]], None]",
    ) -> Result:
        """Returns the result of work in a thread. Calls `left` if the caller leaves while the work runs."""
        try:
            future = executor.submit(contextvars.copy_context().run, _outcome, work)
        except RuntimeError as error:
            raise ClientClosed(
                f"{name!r} cannot run: its worker pool is closed ({error}). Create a new client or pipeline"
            ) from error
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        try:
            result, error = await asyncio.wrap_future(future)
        except BaseException:
            if not future.cancel() and not future.done():
                left(future)
            future.add_done_callback(_close_coroutine)
            raise
        if error is None:
            return cast("Result", result)
        try:
            raise error
        finally:
            del error, future  # the traceback of the error references this frame
