"""Worker threads for terms: bounded, abandonable, and honest about threads that outlive their term.

Python cannot stop a thread. A term that outlives its timeout is abandoned: its caller goes on, its late
result is dropped, and it keeps its slot until its function has really returned. So there are never more
live term threads than slots, however many terms time out.
"""

import asyncio
import contextvars
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from enum import Enum, auto
from typing import Generic, TypeVar, cast

from tinkex_py.losses.slots import Slot, Slots

Result = TypeVar("Result")


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
    # Torch takes that for all threads to come as well; said in a thread of its own, the usual number holds for them.
    restoring = threading.Thread(target=torch.set_num_threads, args=(usual,), name="tinkex-restore")
    restoring.start()
    restoring.join()


class _CallState(Enum):
    PENDING = auto()
    RUNNING = auto()
    DONE = auto()
    DROPPED = auto()
    ABANDONED = auto()


class _Call(Generic[Result]):
    """One piece of work. A state under a lock decides who releases what it holds: the caller or the worker."""

    def __init__(
        self, work: Callable[[], Result], release: Callable[[], None], discard: Callable[[Result], None]
    ) -> None:
        self._work: Callable[[], Result] | None = work
        self._release = release
        self._discard = discard
        self._lock = threading.Lock()
        self._state = _CallState.PENDING
        self._outcome: tuple[Result | None, BaseException | None] = (None, None)
        self._loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[None] = self._loop.create_future()

    def run(self) -> None:
        """Runs in the worker thread."""
        with self._lock:
            if self._state is _CallState.DROPPED:
                return
            self._state = _CallState.RUNNING
        self._outcome = self._attempt()
        with self._lock:
            abandoned = self._was_left()
            self._state = _CallState.DONE
        if not abandoned:
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop closed meanwhile: nobody waits for the result
                abandoned = True
        if abandoned:
            self._release()
            self.drop_outcome()

    def _attempt(self) -> tuple[Result | None, BaseException | None]:
        # The thread must not hold on to the work, or to what it gave: both hold the logprobs, and the thread may be
        # still on its way out of here when the caller looks whether they are gone.
        work, self._work = self._work, None
        assert work is not None, "a call runs once"
        try:
            return work(), None
        except BaseException as error:  # noqa: BLE001  # handed to the waiting caller, whatever it is
            return None, error

    def take_outcome(self) -> tuple[Result | None, BaseException | None]:
        """The result or the failure, once; it is kept nowhere after."""
        outcome, self._outcome = self._outcome, (None, None)
        return outcome

    def drop_outcome(self) -> None:
        """Nobody wants the result any more, if there is one that was not taken."""
        result, _ = self.take_outcome()
        if result is not None:
            self._discard(result)

    def _was_left(self) -> bool:
        return self._state is _CallState.ABANDONED

    def leave(self) -> bool:
        """The caller stops waiting. True if the worker still runs, and will release."""
        with self._lock:
            if self._state is _CallState.PENDING:
                self._state = _CallState.DROPPED
                self._work = None
            if self._state is _CallState.RUNNING:
                self._state = _CallState.ABANDONED
                return True
            return False

    def _deliver(self) -> None:
        if self.finished.done():
            self.drop_outcome()
        else:
            self.finished.set_result(None)


class WorkerThreads:
    """Threads that are kept between calls, at most `limit`.

    Args:
        limit: most threads.
        name: prefix of the threads' names.
        prepare: called once in each new thread.
    """

    def __init__(self, limit: int, name: str, *, prepare: Callable[[], object] | None = None) -> None:
        self.slots = Slots(limit)
        self._name = name
        self._prepare = prepare
        self._pool: ThreadPoolExecutor | None = None

    async def run(
        self,
        work: Callable[[], Result],
        *,
        slot: Slot,
        release: Callable[[], None],
        discard: Callable[[Result], None] = lambda _result: None,
    ) -> Result:
        """Runs `work` in a thread, in a copy of the caller's context.

        Args:
            work: what to run.
            slot: a unit of `self.slots` that the caller holds.
            release: gives back all the caller holds for this work. Called from here only if the caller leaves
                while the work runs, and then after it has ended; otherwise releasing stays with the caller.
            discard: gets a result that came too late for the caller.

        Raises:
            CancelledError: the caller was cancelled; `slot.abandoned` tells whether the work still runs.
        """
        call = _Call(work, release, discard)
        context = contextvars.copy_context()
        self._executor().submit(context.run, call.run)
        try:
            await call.finished
            result, failure = call.take_outcome()
        finally:
            if call.leave():
                self.slots.abandon(slot)
            else:
                call.drop_outcome()  # the caller was cancelled in the same moment in which the result came
        if failure is not None:
            raise failure
        return cast("Result", result)

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.slots.limit, thread_name_prefix=self._name, initializer=self._prepare)
        return self._pool

    def close(self) -> None:
        """Ends the idle threads; abandoned ones end when their function returns."""
        if self._pool is not None:
            self._pool.shutdown(wait=not self.slots.holders())
            self._pool = None


class TermThreads:
    """All threads that the terms of one service client, or of one pipeline, may use.

    Gradients of coroutine terms have workers of their own: a coroutine that holds its permit must never wait
    for a slot whose holder waits for a permit. Sums over all terms have one more, and helpers on the other CPUs while
    they are large; none of these ever runs user code.

    Args:
        max_threads: most live term threads; None is the usable CPU count.
    """

    def __init__(self, max_threads: int | None = None) -> None:
        limit = max_threads or usable_cpu_count()
        prepare = compute_alone if limit > 1 else None
        self.terms = WorkerThreads(limit, "tinkex-term", prepare=prepare)
        self.backward = WorkerThreads(limit, "tinkex-backward", prepare=prepare)
        self.arithmetic = WorkerThreads(1, "tinkex-arithmetic", prepare=compute_alone)
        self._helpers = ThreadPoolExecutor(limit, thread_name_prefix="tinkex-sum", initializer=compute_alone)

    def abandoned(self) -> list[str]:
        """Names of the terms whose threads outlived them."""
        return self.terms.slots.abandoned() + self.backward.slots.abandoned()

    def spread(self, work: Callable[[range], list[Result]], count: int) -> list[Result]:
        """`work` for the numbers below `count`, in as many ranges as there are CPUs; the results in their order.

        For the arithmetic worker, which does the first range itself: while it sums up, the terms of its step have
        ended and their CPUs are free.
        """
        length = max(1, math.ceil(count / self.terms.slots.limit))
        own, *others = [range(first, min(first + length, count)) for first in range(0, count, length)] or [range(0)]
        later = [self._helpers.submit(work, numbers) for numbers in others]
        try:
            results = work(own)
        finally:
            wait(later)
        return results + [result for future in later for result in future.result()]

    def close(self) -> None:
        """Ends all idle threads."""
        for workers in (self.terms, self.backward, self.arithmetic):
            workers.close()
        self._helpers.shutdown()


async def run_released(workers: WorkerThreads, name: str, work: Callable[[], Result]) -> Result:
    """Runs `work` in one of `workers`, waiting for a slot first and giving it back after."""
    slot = await workers.slots.acquire(name)
    try:
        return await workers.run(work, slot=slot, release=slot.release)
    finally:
        if not slot.abandoned:
            slot.release()
