"""Runs coroutines of users, so that none keeps its caller waiting after a cancellation.

A task ends when its coroutine ends, so a coroutine that suppresses CancelledError keeps its task, and whatever waits
for that task. Here it is resumed for a grace after a final cancellation and not later, and its task goes on without it.
"""

import asyncio
import ctypes
import functools
import inspect
import types
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar, cast

Result = TypeVar("Result")


class UserCoroutine:
    """Runs one coroutine of a user in the current task. Each object runs one coroutine.

    Args:
        grace: seconds for which the coroutine is resumed after its final cancellation.
        is_final: returns whether a cancellation of the task is final. Other cancellations are the coroutine's own,
            such as that of an `asyncio.timeout` inside of it.
        running: a context that is entered whenever the coroutine runs, until it suspends.

    Attributes:
        abandoned: whether the coroutine still ran at the end of its grace.
    """

    def __init__(
        self,
        grace: float,
        is_final: Callable[[], bool],
        running: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # it has no state
    ) -> None:
        self.abandoned = False
        self._grace = grace
        self._is_final = is_final
        self._running = running
        self._started: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    async def run(self, awaitable: Awaitable[Result]) -> Result:
        """Awaits it, and raises CancelledError if it is abandoned."""
        self._loop = asyncio.get_running_loop()
        try:
            coroutine = as_coroutine(awaitable)
            return await driven(coroutine, self._resumed, self._suspended, lambda error: self._ends(coroutine, error))
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def tasks_left(self) -> list[str]:
        """Returns the names of the tasks that the coroutine started itself and that still run."""
        return sorted(task.get_name() for task in self._started if isinstance(task, asyncio.Task) and not task.done())

    def what_is_left(self) -> str:
        """Describes what the coroutine left behind, as the end of an error message; empty if there is nothing."""
        facts: list[str] = []
        if self.abandoned:
            facts.append(f"; it did not end within {self._grace:g} s of its cancellation and is not resumed again")
        if tasks := self.tasks_left():
            facts.append(f"; {len(tasks)} task(s) that it started still run: {', '.join(tasks)}")
        return "".join(facts)

    def _resumed(self, resume: Callable[[], Any]) -> Any:
        """Runs the coroutine until it suspends, and notes the tasks that it starts."""
        loop, usual = self._loop, self._loop.get_task_factory()

        def noted(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Future[Any]":
            task = asyncio.Task(work, loop=loop, **options) if usual is None else usual(loop, work, **options)
            self._started.add(task)
            return task

        loop.set_task_factory(noted)
        try:
            with self._running:
                return resume()
        finally:
            if loop.get_task_factory() is noted:
                loop.set_task_factory(usual)

    def _suspended(self, awaited: Any) -> Generator[Any, Any, Any]:
        """Waits as a task does; but a task that is awaited, or a group of tasks, can suppress its cancellation."""
        is_plain = type(awaited) is asyncio.Future or not asyncio.isfuture(awaited)
        if is_plain or awaited.get_loop() is not self._loop:
            return (yield awaited)
        future = cast("asyncio.Future[Any]", awaited)
        while not future.done():
            done: asyncio.Future[None] = self._loop.create_future()
            wake = functools.partial(_set_done, done)
            future.add_done_callback(wake)
            try:
                yield from done.__await__()
            except asyncio.CancelledError as error:
                self._begin_grace()
                if self._is_over or not future.cancel(*error.args):
                    raise
            finally:
                future.remove_done_callback(wake)
        return None

    def _begin_grace(self) -> None:
        if self._timer is None and self._is_final():
            task = asyncio.current_task()
            assert task is not None, "coroutines of users run in tasks"
            self._timer = self._loop.call_later(self._grace, self._expire, task)

    def _expire(self, task: "asyncio.Task[Any]") -> None:
        self._is_over = True
        task.cancel()

    def _ends(self, coroutine: Coroutine[Any, Any, object], error: BaseException) -> bool:
        """Abandons the coroutine if the task must go on without it."""
        if not self._is_over and not isinstance(error, GeneratorExit):
            if isinstance(error, asyncio.CancelledError):
                self._begin_grace()
            return False
        if not isinstance(error, GeneratorExit):
            self.abandoned = True
            task = asyncio.current_task()
            assert task is not None, "coroutines of users run in tasks"
            task.uncancel()  # the cancellation of `_expire`
        frames = _awaiting_each_other(coroutine)
        # RuntimeError: it suppresses GeneratorExit, too. Its clean-up may raise anything else.
        with suppress(Exception):
            self._resumed(coroutine.close)
        for frame in filter(_is_suspended, frames):
            _keep_for_ever(frame)
        return True


@types.coroutine
def driven(
    coroutine: Coroutine[Any, Any, Result],
    run: Callable[[Callable[[], Any]], Any],
    wait: Callable[[Any], Generator[Any, Any, Any]],
    ends: Callable[[BaseException], bool] = lambda _: False,
) -> Generator[Any, Any, Result]:
    """Runs a coroutine as `await` does, and calls a function at each change between running and waiting.

    Args:
        coroutine: the coroutine.
        run: calls its argument, which runs the coroutine until it suspends, and returns what it then awaits.
        wait: waits for that; an exception is raised inside of the coroutine.
        ends: returns whether an exception of `wait` is raised here, and the coroutine is not resumed again.
    """
    resume: Callable[[], Any] = functools.partial(coroutine.send, None)
    while True:
        try:
            awaited = run(resume)
        except StopIteration as stop:
            return stop.value
        try:
            value = yield from wait(awaited)
            resume = functools.partial(coroutine.send, value)
        except BaseException as error:
            if ends(error):
                raise
            resume = functools.partial(coroutine.throw, error)


async def as_coroutine(awaitable: Awaitable[Result]) -> Result:
    """Makes a coroutine of any awaitable."""
    return await awaitable


async def in_own_task(
    awaitable: Awaitable[Result],
    *,
    grace: float,
    name: str,
    running: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # it has no state
) -> Result:
    """Awaits user code in its own task. If the caller is cancelled, the code has `grace` seconds to end.

    Args:
        awaitable: the user code.
        grace: seconds.
        name: name of the task, and of the code in the note that CancelledError gets if something is left.
        running: see `UserCoroutine`.
    """
    cancelled: asyncio.CancelledError | None = None
    code = UserCoroutine(grace, lambda: cancelled is not None, running)

    async def outcome() -> tuple[Result | None, BaseException | None]:
        try:
            return await code.run(awaitable), None
        except BaseException as error:  # noqa: BLE001  # raised by the caller; in a task, some would stop the loop
            return None, error

    task = asyncio.create_task(outcome(), name=name)
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            if cancelled is None:  # a second cancellation would interrupt the clean-up after the first
                cancelled = error
                task.cancel()
    if cancelled is not None:
        if inspect.iscoroutine(awaitable) and inspect.getcoroutinestate(awaitable) == inspect.CORO_CREATED:
            awaitable.close()
        if left := code.what_is_left():
            cancelled.add_note(f"{name} was cancelled{left}")
        raise cancelled
    result, error = task.result()
    if error is None:
        return cast("Result", result)
    try:
        raise error
    finally:
        del error, task  # the traceback of the error references this frame


def _set_done(done: "asyncio.Future[None]", _awaited: object) -> None:
    if not done.done():
        done.set_result(None)


def _awaiting_each_other(coroutine: object) -> list[object]:
    """Returns the coroutine, the one that it awaits, and so on."""
    frames: list[object] = []
    inner: object = coroutine
    while inspect.iscoroutine(inner) or inspect.isgenerator(inner):
        frames.append(inner)
        inner = inner.cr_await if inspect.iscoroutine(inner) else inner.gi_yieldfrom
    return frames


def _is_suspended(frame: object) -> bool:
    if inspect.iscoroutine(frame):
        return inspect.getcoroutinestate(frame) == inspect.CORO_SUSPENDED
    return inspect.isgenerator(frame) and inspect.getgeneratorstate(frame) == inspect.GEN_SUSPENDED


def _keep_for_ever(frame: object) -> None:
    # Python would resume it once more to free it; at exit, where no event loop runs, a loop around `asyncio.sleep`
    # that suppresses every exception would then never end.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(frame))
