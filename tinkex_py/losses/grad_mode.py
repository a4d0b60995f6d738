"""Runs coroutines on one thread with a grad mode for each.

The grad mode is a property of the thread. Without this module, a coroutine that awaits inside `torch.no_grad()` would
disable autograd in every coroutine that runs meanwhile, and the caller's `no_grad` would disable it in the terms.

Entering `torch.inference_mode(False)` disables inference mode and enables grad; leaving it restores both.
"""

import asyncio
import functools
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Seconds for which a coroutine is resumed after it suppresses a cancellation.
GRACE = 5.0


def autograd_on() -> AbstractContextManager[object]:
    """Returns a context in which autograd records. A step enters it often, so it does nothing if autograd is on."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


async def with_own_grad_mode(awaitable: Awaitable[Result], must_end: Callable[[], bool] = lambda: False) -> Result:
    """Awaits with a separate grad mode, which is on at first and is kept across suspensions.

    Args:
        awaitable: the awaitable.
        must_end: returns whether a cancellation is final. If the awaitable suppresses a final cancellation, it is
            closed after `GRACE` seconds and the cancellation is raised.
    """
    grace = _Grace(must_end)
    try:
        return await _driven(_as_coroutine(awaitable), running=_OwnMode(), suspended=nullcontext(), grace=grace)
    finally:
        grace.end()


async def with_grad_on_while_suspended(awaitable: Awaitable[Result]) -> Result:
    """Awaits and keeps the caller's `no_grad` or `inference_mode` from applying to tasks that run meanwhile."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return await awaitable
    coroutine = _as_coroutine(awaitable)
    return await _driven(coroutine, running=nullcontext(), suspended=torch.inference_mode(False), grace=None)


class _OwnMode:
    """Switches to the grad mode of a coroutine while it runs."""

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
    """The time for which a coroutine may continue after a final cancellation."""

    def __init__(self, must_end: Callable[[], bool]) -> None:
        self.is_over = False
        self._must_end = must_end
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Starts the timer at the first final cancellation."""
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
    """Closes a coroutine after the cancellation that `_Grace` sent at the end of its time."""
    task = asyncio.current_task()
    assert task is not None, "terms run in tasks"
    task.uncancel()
    with running, suppress(RuntimeError):  # raised if the coroutine suppresses GeneratorExit too
        coroutine.close()
