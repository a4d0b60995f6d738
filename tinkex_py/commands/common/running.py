"""Runs the asynchronous work of a command, and lets signals end it in good order."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")

BOTH = (signal.SIGINT, signal.SIGTERM)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs work on a loop of its own; SIGTERM ends it as orderly as SIGINT.

    Raises:
        KeyboardInterrupt: one of both came.
    """
    return asyncio.run(_ended_by_sigterm(work))


def run_until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Runs work that ends only when SIGINT or SIGTERM cancels it, which is success."""
    asyncio.run(_ended_by_signals(work))


def run_stoppable(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, Result]], on_stop: Callable[[], object]
) -> tuple[Result, bool]:
    """Runs work that ends soon after an event is set.

    The first SIGINT or SIGTERM sets the event, a second one cancels the work.

    Args:
        work: gets the event.
        on_stop: called at the first signal.

    Returns:
        What the work gave, and whether there was a signal.

    Raises:
        asyncio.CancelledError: there was a second signal.
    """
    return asyncio.run(_stopped_by_signals(work, on_stop))


async def _ended_by_sigterm(work: Coroutine[Any, Any, Result]) -> Result:
    task = asyncio.current_task()
    assert task is not None
    terminated = asyncio.Event()

    def terminate() -> None:
        terminated.set()
        task.cancel()

    with _heard((signal.SIGTERM,), terminate):
        try:
            return await work
        except asyncio.CancelledError:
            if terminated.is_set():
                raise KeyboardInterrupt from None
            raise


async def _ended_by_signals(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    with _heard(BOTH, task.cancel), contextlib.suppress(asyncio.CancelledError):
        await task


async def _stopped_by_signals(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, Result]], on_stop: Callable[[], object]
) -> tuple[Result, bool]:
    stop = asyncio.Event()
    task = asyncio.create_task(work(stop))

    def heard() -> None:
        if stop.is_set():
            task.cancel()
        else:
            stop.set()
            on_stop()

    with _heard(BOTH, heard):
        return await task, stop.is_set()


@contextmanager
def _heard(signals: tuple[signal.Signals, ...], handler: Callable[[], object]) -> Generator[None]:
    loop = asyncio.get_running_loop()
    for number in signals:
        # Windows has no signal handlers on its loops; there Ctrl-C cancels the main task.
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in signals:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
