"""Keeps torch's grad mode apart for coroutines that share the event loop's thread.

The grad mode belongs to the thread. A coroutine that awaits inside `torch.no_grad()` would silence every
other coroutine that runs meanwhile, and a caller's `no_grad` would silence the terms.

Entering `torch.inference_mode(False)` switches inference off and grad on; leaving it restores both.
"""

import types
from collections.abc import Awaitable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def autograd_on() -> AbstractContextManager[object]:
    """For code that autograd has to record. It enters nothing where nothing is off: a step does this often."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


async def with_own_grad_mode(awaitable: Awaitable[Result]) -> Result:
    """Awaits with a grad mode of its own, which is on at first and survives every suspension."""
    return await _own_mode_while_running(_as_coroutine(awaitable))


async def with_grad_on_while_suspended(awaitable: Awaitable[Result]) -> Result:
    """Awaits so that the caller's `no_grad` or `inference_mode` does not reach the tasks that run meanwhile."""
    return await _grad_on_while_suspended(_as_coroutine(awaitable))


async def _as_coroutine(awaitable: Awaitable[Result]) -> Result:
    return await awaitable


@types.coroutine
def _own_mode_while_running(coroutine: Coroutine[Any, Any, Result]) -> Generator[Any, Any, Result]:
    own_mode = True
    value: Any = None
    thrown: BaseException | None = None
    while True:
        with torch.inference_mode(False):
            torch.set_grad_enabled(own_mode)
            try:
                suspended_on = coroutine.send(value) if thrown is None else coroutine.throw(thrown)
            except StopIteration as stop:
                return stop.value
            own_mode = torch.is_grad_enabled()
        value, thrown = None, None
        try:
            value = yield suspended_on
        except BaseException as error:  # noqa: BLE001  # passed on into the coroutine, as `await` itself does
            thrown = error


@types.coroutine
def _grad_on_while_suspended(coroutine: Coroutine[Any, Any, Result]) -> Generator[Any, Any, Result]:
    value: Any = None
    thrown: BaseException | None = None
    while True:
        try:
            suspended_on = coroutine.send(value) if thrown is None else coroutine.throw(thrown)
        except StopIteration as stop:
            return stop.value
        value, thrown = None, None
        with torch.inference_mode(False):
            try:
                value = yield suspended_on
            except BaseException as error:  # noqa: BLE001  # as above
                thrown = error
