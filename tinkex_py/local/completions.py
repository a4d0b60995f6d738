"""Completed sampling requests, for clients that wait for all of theirs with one poll."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

CLONE = 1_000_000_000
"""Numbers of sampling requests are `CLONE * clone + n`: each copy of a client counts on its own."""
PER_ANSWER = 1024
# A sampling session, and the clone of its client.
QueueKey = tuple[str, int]


@dataclass
class _Queue:
    """Cursors of completed requests by request id, oldest first."""

    cursors: dict[str, int] = field(default_factory=dict[str, int])
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    polls: int = 0


class CompletionQueues:
    """One queue for each key. A completion stays until it is acknowledged.

    Of clients that do not acknowledge, the newest `keep` stay. Cursors count over all queues, so that a queue can go
    when it is empty.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._queues: dict[QueueKey, _Queue] = {}
        # Of all queues, oldest first.
        self._kept: dict[str, QueueKey] = {}
        self._count = 0
        self._closing = False

    def add(self, key: QueueKey, request_id: str) -> None:
        """A request is completed."""
        self._count += 1
        queue = self._queues.setdefault(key, _Queue())
        queue.cursors[request_id] = self._count
        queue.arrived.set()
        self._kept[request_id] = key
        if len(self._kept) > self._keep:
            oldest, owner = next(iter(self._kept.items()))
            self._drop(owner, [oldest])

    async def after(self, key: QueueKey, cursor: int, seconds: float) -> dict[str, int]:
        """Acknowledge everything up to a cursor, and wait for what comes after it.

        Returns:
            Cursors by request id, oldest first; empty if there are none within the time, or the service closes.
        """
        queue = self._queues.setdefault(key, _Queue())
        queue.polls += 1
        try:
            self._drop(key, [request_id for request_id, at in queue.cursors.items() if at <= cursor])
            if not queue.cursors and not self._closing:
                queue.arrived.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await queue.arrived.wait()
            return dict(islice(queue.cursors.items(), PER_ANSWER))
        finally:
            queue.polls -= 1
            self._drop(key, [])

    def close(self) -> None:
        """Let every poll return, now and from now on."""
        self._closing = True
        for queue in self._queues.values():
            queue.arrived.set()

    def _drop(self, key: QueueKey, request_ids: list[str]) -> None:
        """Drop completions, and their queue if it is empty then and no poll waits for it."""
        queue = self._queues[key]
        for request_id in request_ids:
            del queue.cursors[request_id]
            del self._kept[request_id]
        if not queue.cursors and not queue.polls:
            del self._queues[key]
