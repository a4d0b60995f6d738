"""A bounded set of connections that survives any number of cancelled exchanges.

Each member is a client of its own with one connection. An exchange that does not end well (cancelled, timed out,
broken) closes its member, so no half-used connection and no lost slot can stay behind; the next exchange opens a
fresh one. So does a member that holds bytes behind the answer: they would be taken for the next answer.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

_LOGGER = logging.getLogger("tinkex_py")


class Closable(Protocol):
    """What the pool needs to know about its members."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing of the last exchange is left, so that another one can follow."""
        ...

    async def aclose(self) -> None:
        """Close the connection."""
        ...


Member = TypeVar("Member", bound=Closable)


class ConnectionPool(Generic[Member]):
    """At most `max_connections` exchanges at a time; the others wait in the order they came.

    Args:
        open_member: makes a member; called while the slot is held.
        max_connections: how many exchanges may run at a time.
    """

    def __init__(self, open_member: Callable[[], Awaitable[Member]], max_connections: int) -> None:
        self._open_member = open_member
        self._slots = asyncio.Semaphore(max_connections)
        self._idle: list[Member] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @asynccontextmanager
    async def connection(self, *, fresh: bool = False) -> AsyncGenerator[Member, None]:
        """Hold one member. Leaving the block with any exception closes it.

        Args:
            fresh: one that was never used; an idle one makes room for it.
        """
        async with self._slots:
            idle = self._idle.pop() if self._idle else None
            if idle is not None and fresh:
                self._discard(idle)
                idle = None
            member = idle or await self._open_member()
            try:
                yield member
            except BaseException:
                self._discard(member)
                raise
            if self._closed or not member.is_clean:
                self._discard(member)
            else:
                self._idle.append(member)

    async def aclose(self) -> None:
        """Close every idle member now and every other one when it is given back; wait for all closings so far."""
        self._closed = True
        while self._idle:
            self._discard(self._idle.pop())
        while self._closing:
            await asyncio.wait(self._closing)

    def _discard(self, member: Member) -> None:
        # In a task of its own: a second cancellation of the caller cannot interrupt the closing.
        task = asyncio.create_task(_close(member), name="tinkex.http.close")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close(member: Closable) -> None:
    try:
        await member.aclose()
    except Exception as error:  # noqa: BLE001  (a broken connection may fail to close in any way; nothing is left to do)
        _LOGGER.debug("closing a connection failed: %s", type(error).__name__)
