"""Measures how long the service holds the requests of a run in its queue."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from tinkex_py.types import QueueState

INTERVAL = 0.1  # seconds between two reads of the client's queue state

_REASONS = {"paused_capacity": "the service is at capacity", "paused_rate_limit": "the account reached its rate limit"}


class QueueWait:
    """Follows the queue state of a training client.

    Args:
        read: returns the state.
        on_change: called with the reason when requests begin to wait, and with None when the wait ends.
    """

    def __init__(self, read: Callable[[], QueueState], on_change: Callable[[str | None], None]) -> None:
        self._read = read
        self._on_change = on_change
        self._waiting: QueueState | None = None
        self._before = 0.0

    def seconds(self) -> float:
        """Returns the total time that requests have waited so far."""
        self._look()
        return self._before + (0.0 if self._waiting is None else max(0.0, time.time() - self._waiting.since))

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Reads the state regularly while the block runs."""
        done = asyncio.Event()
        watcher = asyncio.create_task(self._watch(done), name="tinkex.queue")
        try:
            yield
        finally:
            done.set()
            await watcher

    async def _watch(self, done: asyncio.Event) -> None:
        while not done.is_set():
            self._look()
            try:
                async with asyncio.timeout(INTERVAL):
                    await done.wait()
            except TimeoutError:
                continue

    def _look(self) -> None:
        state, before = self._read(), self._waiting
        waiting = None if state.state == "active" else state
        if waiting == before:
            return
        if before is not None:
            self._before += max(0.0, state.since - before.since)
        self._waiting = waiting
        self._on_change(None if waiting is None else _words(waiting))


def _words(state: QueueState) -> str:
    reason = _REASONS.get(state.state, state.state)
    return reason if state.reason is None else f"{reason} ({state.reason})"
