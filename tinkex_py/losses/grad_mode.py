"""Drives coroutines that share the event loop's thread: each with its own grad mode, none beyond its end.

The grad mode belongs to the thread. A coroutine that awaits inside `torch.no_grad()` would silence every
other coroutine that runs meanwhile, and a caller's `no_grad` would silence the terms.

Entering `torch.inference_mode(False)` switches inference off and grad on; leaving it restores both.
"""

import asyncio
import functools
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Seconds for which a coroutine is still resumed after a cancellation that it swallows.
GRACE = 5.0


def autograd_on() -> AbstractContextManager[object]:
    """For code that autograd has to record. It enters nothing where nothing is off: a step does this often."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


async def with_own_grad_mode(awaitable: Awaitable[Result], must_end: Callable[[], bool] = lambda: False) -> Result:
    """Awaits with a grad mode of its own, which is on at first and survives every suspension.

    Args:
        awaitable: what to await.
        must_end: whether a cancellation that arrives is final. If the awaitable goes on in spite of it, it is closed
            after `GRACE` seconds, and the cancellation is raised.
    """
    grace = _Grace(must_end)
    try:
        return await _driven(_as_coroutine(awaitable), running=_OwnMode(), suspended=nullcontext(), grace=grace)
    finally:
        grace.end()


async def with_grad_on_while_suspended(awaitable: Awaitable[Result]) -> Result:
    """Awaits so that the caller's `no_grad` or `inference_mode` does not reach the tasks that run meanwhile."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return await awaitable
    coroutine = _as_coroutine(awaitable)
    return await _driven(coroutine, running=nullcontext(), suspended=torch.inference_mode(False), grace=None)


class _OwnMode:
    """Switches to a coroutine's own grad mode while it runs."""

    def __init__(self) -> None:
        self._is_on = True
        self._on = torch.inference_mode(False)

    def __enter__(self) -> None:
        self._on.__enter__()
        torch.set_grad_enabled(self._is_on)

    def __exit__(self, *exc: Any) -> None:
        self._is_on = torch.is_grad_enabled()
        self._on.__exit__(*exc)


class _Grace:
    """The time for which a coroutine may go on after a final cancellation."""

    def __init__(self, must_end: Callable[[], bool]) -> None:
        self.is_over = False
        self._must_end = must_end
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """At a cancellation."""
        if self._timer is None and self._must_end():
            task = asyncio.current_task()
            assert task is not None, "terms run in tasks"
            self._timer = asyncio.get_running_loop().call_later(GRACE, self._expire, task)

    def _expire(self, task: "asyncio.Task[Any]") -> None:
        self.is_over = True
        task.cancel()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


async def _as_coroutine(awaitable: Awaitable[Result]) -> Result:
    return await awaitable


@types.coroutine
def _driven(
    coroutine: Coroutine[Any, Any, Result],
    *,
    running: AbstractContextManager[object],
    suspended: AbstractContextManager[object],
    grace: _Grace | None,
) -> Generator[Any, Any, Result]:
    resume = functools.partial(coroutine.send, None)
    while True:
        try:
            with running:
                awaited = resume()
        except StopIteration as stop:
            return stop.value
        try:
            with suspended:
                value = yield awaited
            resume = functools.partial(coroutine.send, value)
        except BaseException as error:
            if grace is not None and grace.is_over:
                _give_up(coroutine, running)
                raise
            if grace is not None and isinstance(error, asyncio.CancelledError):
                grace.begin()
            resume = functools.partial(coroutine.throw, error)


def _give_up(coroutine: Coroutine[Any, Any, object], running: AbstractContextManager[object]) -> None:
    """Closes a coroutine that a second cancellation, by its grace, woke up."""
    task = asyncio.current_task()
    assert task is not None, "terms run in tasks"
    task.uncancel()
    with running, suppress(RuntimeError):  # raised if it ignores even that
        coroutine.close()
