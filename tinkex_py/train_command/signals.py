"""Lets a signal end a run in good order."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def with_signals(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, Result]], on_stop: Callable[[], object]
) -> Result:
    """Runs work that ends soon after an event is set.

    The first SIGINT or SIGTERM sets the event, a second one cancels the work.

    Args:
        work: gets the event.
        on_stop: called at the first signal.

    Raises:
        asyncio.CancelledError: there was a second signal.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    task = asyncio.create_task(work(stop))

    def heard() -> None:
        if stop.is_set():
            task.cancel()
        else:
            stop.set()
            on_stop()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        # Windows has no signal handlers on its loops; there Ctrl-C cancels this function itself.
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, heard)
    try:
        return await task
    finally:
        for number in signals:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
