"""Futures of the protocol, and the queues that announce completed sampling requests."""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

CLONE = 1_000_000_000
"""Numbers of sampling requests are `CLONE * clone + n`: each copy of a client counts separately."""
COMPLETIONS_PER_POLL = 1024
Category = Literal["user", "server", "unknown"]
# A sampling session, and the clone of its client.
QueueKey = tuple[str, int]


@dataclass(frozen=True)
class Success:
    """A result.

    Args:
        json: creates the JSON form.
        protobuf: the binary form, for results that have one.
        then: runs on the event loop before clients can retrieve the result.
    """

    json: Callable[[], Mapping[str, Any]]
    protobuf: bytes | None = None
    then: Callable[[], None] | None = None


def failed(error: BaseException) -> "Future[Success]":
    """Returns the future of work that failed before it was queued."""
    future: Future[Success] = Future()
    future.set_exception(error)
    return future


@dataclass(frozen=True)
class Failure:
    """A failed request; `category` says whether the user or the service can fix it."""

    message: str
    category: Category


@dataclass
class PendingResult:
    """One future.

    Attributes:
        done: set when there is an outcome, or when the service closes.
        note: returns why the work has not started.
        cancel: cancels work that has not started.
        queue: where the completion is announced.
    """

    request_id: str
    done: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Success | Failure | None = None
    note: Callable[[], str | None] | None = None
    cancel: Callable[[], bool] | None = None
    queue: QueueKey | None = None

    @property
    def size(self) -> int:
        """Bytes of the result."""
        binary = self.outcome.protobuf if isinstance(self.outcome, Success) else None
        return 0 if binary is None else len(binary)


class ResultBook:
    """All futures of one run of the service.

    Keeps the newest `keep` finished results, and `keep_bytes` bytes of those that clients have retrieved.
    """

    def __init__(self, keep: int, keep_bytes: int) -> None:
        self._keep = keep
        self._keep_bytes = keep_bytes
        # Request ids of an earlier run must not find a result of this one.
        self._run_mark = uuid.uuid4().hex[:8]
        self._count = 0
        self._results: dict[str, PendingResult] = {}
        # Request ids, oldest first.
        self._finished: dict[str, None] = {}
        self._fetched: dict[str, None] = {}
        self._fetched_bytes = 0
        self.completions = CompletionQueues(4 * keep)
        self.closing = False

    def open(self) -> PendingResult:
        """Returns a new future."""
        self._count += 1
        pending = PendingResult(f"{self._run_mark}-{self._count}")
        self._results[pending.request_id] = pending
        while len(self._results) > self._keep and self._finished:
            self.forget(next(iter(self._finished)))
        while self._fetched_bytes > self._keep_bytes:
            self.forget(next(iter(self._fetched)))
        return pending

    def settle(self, pending: PendingResult, outcome: Success | Failure) -> None:
        """Sets the outcome of a future; later calls have no effect."""
        if pending.outcome is None:
            pending.outcome = outcome
            self._finished[pending.request_id] = None
            pending.done.set()
            if pending.queue is not None:
                self.completions.add(pending.queue, pending.request_id)

    def announce(self, request_id: str, queue: QueueKey) -> None:
        """Adds a new future to a queue as soon as it is done."""
        pending = self._results.get(request_id)
        if pending is not None and pending.outcome is None:
            pending.queue = queue

    def fetch(self, pending: PendingResult) -> Success | Failure | None:
        """Returns the outcome for a client, which may retrieve it again."""
        if pending.outcome is not None and pending.request_id in self._results:
            if pending.request_id not in self._fetched:
                self._fetched_bytes += pending.size
            self._fetched[pending.request_id] = None
        return pending.outcome

    def find(self, request_id: str) -> PendingResult | None:
        """Returns the future with this id, or None if it is unknown or forgotten."""
        return self._results.get(request_id)

    def was_given(self, request_id: str) -> bool:
        """Whether this run of the service created the id."""
        mark, _, number = request_id.partition("-")
        is_number = number.isdecimal() and len(number) <= len(str(self._count))
        return mark == self._run_mark and is_number and 0 < int(number) <= self._count

    def forget(self, request_id: str) -> None:
        """Drops a finished result."""
        self._finished.pop(request_id, None)
        pending = self._results.pop(request_id, None)
        if pending is not None and request_id in self._fetched:
            del self._fetched[request_id]
            self._fetched_bytes -= pending.size

    def release(self, request_id: str, queue: QueueKey) -> None:
        """Drops a result that its client has retrieved; results of other queues are left alone."""
        pending = self._results.get(request_id)
        if pending is not None and pending.queue == queue and pending.outcome is not None:
            self.forget(request_id)

    async def wait(self, pending: PendingResult, seconds: float) -> bool:
        """Waits for a result; returns False if there is none within `seconds` or the service closes."""
        if pending.outcome is None and not self.closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await pending.done.wait()
        return pending.outcome is not None

    def close_polls(self) -> None:
        """Lets every poll return, now and from now on."""
        self.closing = True
        self.completions.close()
        for pending in self._results.values():
            pending.done.set()

    def close(self) -> None:
        """Lets every poll return, and fails unfinished requests."""
        self.close_polls()
        for pending in self._results.values():
            self.settle(pending, Failure("the service stopped before this request was done", "server"))


@dataclass
class _Queue:
    """Cursors of completed requests by request id, oldest first."""

    cursors: dict[str, int] = field(default_factory=dict[str, int])
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    polls: int = 0


class CompletionQueues:
    """Queues of completed requests, so that a client waits for all of its samples with one poll.

    A completion stays until it is acknowledged; over all queues the newest `keep` stay. Cursors are unique over all
    queues, so that empty queues can be dropped.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._queues: dict[QueueKey, _Queue] = {}
        # The queue of each completion, oldest first.
        self._kept: dict[str, QueueKey] = {}
        self._count = 0
        self._closing = False

    def add(self, key: QueueKey, request_id: str) -> None:
        """Announces a completed request."""
        self._count += 1
        queue = self._queues.setdefault(key, _Queue())
        queue.cursors[request_id] = self._count
        queue.arrived.set()
        self._kept[request_id] = key
        if len(self._kept) > self._keep:
            oldest, owner = next(iter(self._kept.items()))
            self._drop(owner, [oldest])

    async def after(self, key: QueueKey, cursor: int, seconds: float) -> dict[str, int]:
        """Acknowledges everything up to a cursor, and waits for later completions.

        Returns:
            Cursors by request id, oldest first; empty if there are none within `seconds`, or the service closes.
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
            return dict(islice(queue.cursors.items(), COMPLETIONS_PER_POLL))
        finally:
            queue.polls -= 1
            self._drop(key, [])

    def close(self) -> None:
        """Lets every poll return, now and from now on."""
        self._closing = True
        for queue in self._queues.values():
            queue.arrived.set()

    def _drop(self, key: QueueKey, request_ids: list[str]) -> None:
        """Drops completions, and their queue once it is empty and not polled."""
        queue = self._queues[key]
        for request_id in request_ids:
            del queue.cursors[request_id]
            del self._kept[request_id]
        if not queue.cursors and not queue.polls:
            del self._queues[key]
