"""Keeps torch's modes of one term out of everything else: its grad mode, and its changes of torch's defaults.

The grad mode is a property of the thread. Without this module, a coroutine that awaits inside `torch.no_grad()` would
disable autograd in every coroutine that runs meanwhile, and the caller's `no_grad` would disable it in the terms. The
default device is a property of the thread, too, and the default dtype one of the process.

Entering `torch.inference_mode(False)` disables inference mode and enables grad; leaving it restores both.
"""

import threading
from collections.abc import Awaitable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Defaults:
    """torch's defaults when code of a user begins to run.

    Attributes:
        device: the default device, which belongs to the thread.
        number: of this code, if no other ran when it began; else 0.
    """

    device: torch.device
    number: int


class _DefaultDtype:
    """Finds out which code of users changed torch's default dtype, which belongs to the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._entered = 0
        self._usual = torch.float32

    def enter(self) -> int:
        """Returns the number of this code, or 0 if other code runs."""
        with self._lock:
            self._running += 1
            self._entered += 1
            if self._running > 1:
                return 0
            self._usual = torch.get_default_dtype()
            return self._entered

    def leave(self, number: int, *, restore: bool = True) -> torch.dtype | None:
        """Restores the dtype when no other code runs. Returns the dtype that this code left, if it surely did that."""
        with self._lock:
            self._running -= 1
            now = torch.get_default_dtype()
            if now == self._usual:
                return None
            if self._running == 0 and restore:
                torch.set_default_dtype(self._usual)
            return now if number == self._entered else None


_default_dtype = _DefaultDtype()


@contextmanager
def changes_of_libraries() -> Generator[None]:
    """Marks code that changes torch's defaults for a while, such as the loading of a model; no term is blamed then."""
    number = _default_dtype.enter()
    try:
        yield
    finally:
        _default_dtype.leave(number, restore=False)


def defaults_before() -> Defaults:
    """Returns what `changed_since` compares with; each call needs one of `changed_since` in the same thread."""
    return Defaults(torch.get_default_device(), _default_dtype.enter())


def changed_since(before: Defaults) -> str | None:
    """Restores torch's default dtype and device where possible. Returns how the code changed them, if it surely did."""
    changes: list[str] = []
    dtype = _default_dtype.leave(before.number)
    if dtype is not None:
        changes.append(f"the default dtype to {dtype}")
    device = torch.get_default_device()
    if device != before.device:
        torch.set_default_device(None if before.device.type == "cpu" else before.device)
        changes.append(f"the default device to {device}")
    return " and ".join(changes) or None


class OwnModes:
    """A context for the time in which one coroutine runs, with its own grad mode, which is on at first.

    Attributes:
        changed: how the coroutine changed torch's defaults; None if it surely did not.
    """

    def __init__(self) -> None:
        self.changed: str | None = None
        self._is_on = True
        self._on = torch.inference_mode(False)
        # Of a `with torch.device(...)` that is open while the coroutine is suspended; only the coroutine can leave it.
        self._open_device: torch.device | None = None

    def __enter__(self) -> None:
        before = defaults_before()
        is_open = before.device == self._open_device
        self._before = replace(before, device=self._before.device) if is_open else before
        self._on.__enter__()
        torch.set_grad_enabled(self._is_on)

    def __exit__(self, *exc: Any) -> None:
        self._is_on = torch.is_grad_enabled()
        self._on.__exit__(*exc)
        changed, self._open_device = changed_since(self._before), None
        if changed is not None:
            self.changed = self.changed or changed
            device = torch.get_default_device()
            self._open_device = None if device == self._before.device else device
