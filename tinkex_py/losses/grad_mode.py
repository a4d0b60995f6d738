"""Keeps torch's grad mode apart for terms that share the event loop's thread.

The grad mode belongs to the thread. A coroutine that awaits inside `torch.no_grad()` would silence every
other coroutine that runs meanwhile, and a caller's `no_grad` would silence the terms.
"""

import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


async def with_own_grad_mode(awaitable: Awaitable[Result]) -> Result:
    """Awaits with a grad mode of its own, which is on at first and survives every suspension."""
    return await _drive(_as_coroutine(awaitable), suspended_mode=None)


async def with_grad_mode_kept(awaitable: Awaitable[Result]) -> Result:
    """Awaits with grad on, also for other tasks while this one is suspended; the caller's own mode comes back after.

    Without it a caller's `torch.no_grad()` around an await would reach every task that runs meanwhile, subtasks
    of the terms among them.
    """
    return await _drive(_as_coroutine(awaitable), suspended_mode=True)


async def _as_coroutine(awaitable: Awaitable[Result]) -> Result:
    return await awaitable


@types.coroutine
def _drive(coroutine: Coroutine[Any, Any, Result], *, suspended_mode: bool | None) -> Generator[Any, Any, Result]:
    term_mode = True
    caller_mode = torch.is_grad_enabled()
    value: Any = None
    thrown: BaseException | None = None
    while True:
        loop_mode = torch.is_grad_enabled() if suspended_mode is None else caller_mode
        with torch.inference_mode(False):
            torch.set_grad_enabled(term_mode)
            try:
                suspended_on = coroutine.send(value) if thrown is None else coroutine.throw(thrown)
            except StopIteration as stop:
                return stop.value
            finally:
                term_mode = torch.is_grad_enabled()
                torch.set_grad_enabled(loop_mode)
        value, thrown = None, None
        if suspended_mode is not None:
            torch.set_grad_enabled(suspended_mode)
        try:
            value = yield suspended_on
        except BaseException as error:  # noqa: BLE001  # passed on into the coroutine, as `await` itself does
            thrown = error
