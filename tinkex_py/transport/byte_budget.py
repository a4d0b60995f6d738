"""A bound on how many bytes are under way at once."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class ByteBudget:
    """At most so many bytes at a time; whoever wants more waits, in the order they came.

    What is larger than the whole budget goes alone.

    Args:
        limit: the budget in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def held(self) -> int:
        """Bytes that are under way."""
        return self._held

    @asynccontextmanager
    async def hold(self, count: int) -> AsyncGenerator[None]:
        """Holds so many bytes of the budget while the block runs."""
        await self._take(count)
        try:
            yield
        finally:
            self._give_back(count)

    async def _take(self, count: int) -> None:
        if not self._waiting and self._fits(count):
            self._held += count
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came in the same moment
                self._give_back(count)
            else:
                self._waiting.remove((count, turn))
                self._admit()
            raise

    def _give_back(self, count: int) -> None:
        self._held -= count
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            count, turn = self._waiting.popleft()
            self._held += count
            turn.set_result(None)

    def _fits(self, count: int) -> bool:
        return self._held == 0 or self._held + count <= self._limit
