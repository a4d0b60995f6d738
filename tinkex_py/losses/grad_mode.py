"""Runs coroutines on one thread with a grad mode for each.

The grad mode is a property of the thread. Without this module, a coroutine that awaits inside `torch.no_grad()` would
disable autograd in every coroutine that runs meanwhile, and the caller's `no_grad` would disable it in the terms.

Entering `torch.inference_mode(False)` disables inference mode and enables grad; leaving it restores both.
"""

from collections.abc import Awaitable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from tinkex_py.user_coroutines import as_coroutine, driven

Result = TypeVar("Result")


def autograd_on() -> AbstractContextManager[object]:
    """Returns a context in which autograd records. A step enters it often, so it does nothing if autograd is on."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


async def with_grad_on_while_suspended(awaitable: Awaitable[Result]) -> Result:
    """Awaits and keeps the caller's `no_grad` or `inference_mode` from applying to tasks that run meanwhile."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return await awaitable

    def wait(awaited: Any) -> Generator[Any, Any, Any]:
        with torch.inference_mode(False):
            return (yield awaited)

    return await driven(as_coroutine(awaitable), lambda resume: resume(), wait)


class OwnGradMode:
    """A context for the time in which one coroutine runs. Grad is on at first; later, as the coroutine left it."""

    def __init__(self) -> None:
        self._is_on = True
        self._on = torch.inference_mode(False)

    def __enter__(self) -> None:
        self._on.__enter__()
        torch.set_grad_enabled(self._is_on)

    def __exit__(self, *exc: Any) -> None:
        self._is_on = torch.is_grad_enabled()
        self._on.__exit__(*exc)
