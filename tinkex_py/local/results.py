"""Futures of the protocol: a request is answered with an id at once; its result can be fetched as often as wanted."""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from tinkex_py.local.completions import CompletionQueues, QueueKey

Category = Literal["user", "server", "unknown"]


@dataclass(frozen=True)
class Success:
    """A success.

    Args:
        json: makes the JSON form.
        protobuf: the binary form, for the results that have one.
        then: runs on the event loop before anybody sees the answer.
    """

    json: Callable[[], Mapping[str, Any]]
    protobuf: bytes | None = None
    then: Callable[[], None] | None = None


@dataclass(frozen=True)
class Failure:
    """The work failed; category says who can do something about it."""

    message: str
    category: Category


@dataclass
class PendingResult:
    """One future.

    Attributes:
        done: set when polls need not wait any more: there is an outcome, or the service closes.
        note: says why it has not started.
        cancel: gives up work that has not begun.
        queue: where it is announced when it is done.
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
    """All futures of one service run.

    Of the finished ones the newest `keep` stay, and of those that were fetched the newest `keep_bytes` bytes.
    """

    def __init__(self, keep: int, keep_bytes: int) -> None:
        self._keep = keep
        self._keep_bytes = keep_bytes
        # Ids of an earlier run must not find a result of this one.
        self._mark = uuid.uuid4().hex[:8]
        self._count = 0
        self._results: dict[str, PendingResult] = {}
        # Ids, oldest first.
        self._finished: dict[str, None] = {}
        self._fetched: dict[str, None] = {}
        self._fetched_bytes = 0
        self.completions = CompletionQueues(4 * keep)
        self.closing = False

    def open(self) -> PendingResult:
        """A new future."""
        self._count += 1
        pending = PendingResult(f"{self._mark}-{self._count}")
        self._results[pending.request_id] = pending
        while len(self._results) > self._keep and self._finished:
            self.forget(next(iter(self._finished)))
        while self._fetched_bytes > self._keep_bytes:
            self.forget(next(iter(self._fetched)))
        return pending

    def settle(self, pending: PendingResult, outcome: Success | Failure) -> None:
        """Give a future its result, once."""
        if pending.outcome is None:
            pending.outcome = outcome
            self._finished[pending.request_id] = None
            pending.done.set()
            if pending.queue is not None:
                self.completions.add(pending.queue, pending.request_id)

    def announce(self, request_id: str, queue: QueueKey) -> None:
        """Put a future that has just been opened into a queue when it is done."""
        pending = self._results.get(request_id)
        if pending is not None and pending.outcome is None:
            pending.queue = queue

    def fetch(self, pending: PendingResult) -> Success | Failure | None:
        """The outcome for a client, which may ask for it again."""
        if pending.outcome is not None and pending.request_id in self._results:
            if pending.request_id not in self._fetched:
                self._fetched_bytes += pending.size
            self._fetched[pending.request_id] = None
        return pending.outcome

    def find(self, request_id: str) -> PendingResult | None:
        """The future with this id, if it is still known."""
        return self._results.get(request_id)

    def was_given(self, request_id: str) -> bool:
        """Whether this run gave out the id and has forgotten the result since."""
        mark, _, number = request_id.partition("-")
        is_number = number.isdecimal() and len(number) <= len(str(self._count))
        return mark == self._mark and is_number and 0 < int(number) <= self._count

    def forget(self, request_id: str) -> None:
        """Drop a finished result."""
        self._finished.pop(request_id, None)
        pending = self._results.pop(request_id, None)
        if pending is not None and request_id in self._fetched:
            del self._fetched[request_id]
            self._fetched_bytes -= pending.size

    def release(self, request_id: str, queue: QueueKey) -> None:
        """Drop a result that a client has; only one of its own queue."""
        pending = self._results.get(request_id)
        if pending is not None and pending.queue == queue and pending.outcome is not None:
            self.forget(request_id)

    async def wait(self, pending: PendingResult, seconds: float) -> bool:
        """Wait for a result, at most so long; False when there is none yet or the service closes."""
        if pending.outcome is None and not self.closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await pending.done.wait()
        return pending.outcome is not None

    def close_polls(self) -> None:
        """Let every poll return, now and from now on."""
        self.closing = True
        self.completions.close()
        for pending in self._results.values():
            pending.done.set()

    def close(self) -> None:
        """Let every poll return, and fail what is not done."""
        self.close_polls()
        for pending in self._results.values():
            self.settle(pending, Failure("the service was stopped before this request was done", "server"))
