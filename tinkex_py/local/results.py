"""Futures of the protocol: a request is answered with an id at once; its result can be fetched as often as wanted."""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Category = Literal["user", "server", "unknown"]


@dataclass(frozen=True)
class Answer:
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
        fetched: whether somebody has seen the outcome.
        note: says why it has not started.
        cancel: gives up work that has not begun.
    """

    request_id: str
    fetched: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Answer | Failure | None = None
    note: Callable[[], str | None] | None = None
    cancel: Callable[[], bool] | None = None

    @property
    def size(self) -> int:
        """Bytes of the result."""
        binary = self.outcome.protobuf if isinstance(self.outcome, Answer) else None
        return 0 if binary is None else len(binary)

    def settle(self, outcome: Answer | Failure) -> None:
        """Give the result, once."""
        if self.outcome is None:
            self.outcome = outcome
            self.done.set()


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
        self.closing = asyncio.Event()

    def open(self) -> PendingResult:
        """A new future."""
        self._count += 1
        pending = PendingResult(f"{self._mark}-{self._count}")
        self._results[pending.request_id] = pending
        self._forget_oldest()
        return pending

    def find(self, request_id: str) -> PendingResult | None:
        """The future with this id, if it is still known."""
        return self._results.get(request_id)

    def was_given(self, request_id: str) -> bool:
        """Whether this run gave out the id and has forgotten the result since."""
        mark, _, number = request_id.partition("-")
        is_number = number.isdecimal() and len(number) <= len(str(self._count))
        return mark == self._mark and is_number and 0 < int(number) <= self._count

    def forget(self, request_id: str) -> None:
        """Drop a result."""
        self._results.pop(request_id, None)

    async def wait(self, pending: PendingResult, seconds: float) -> bool:
        """Wait for a result, at most so long; False when there is none yet or the service closes."""
        if pending.outcome is not None:
            return True
        finished = asyncio.ensure_future(pending.done.wait())
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait((finished, closing), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished.cancel()
            closing.cancel()
            await asyncio.gather(finished, closing, return_exceptions=True)
        return pending.done.is_set()

    def close(self) -> None:
        """Let every poll return, and fail what is not done."""
        self.closing.set()
        for pending in self._results.values():
            pending.settle(Failure("the service was stopped before this request was done", "server"))

    def _forget_oldest(self) -> None:
        excess = len(self._results) - self._keep
        if excess > 0:
            finished = [key for key, pending in self._results.items() if pending.outcome is not None]
            for key in finished[:excess]:
                del self._results[key]
        held = {key: pending.size for key, pending in self._results.items() if pending.fetched}
        excess_bytes = sum(held.values()) - self._keep_bytes
        for key, size in held.items():
            if excess_bytes <= 0:
                break
            del self._results[key]
            excess_bytes -= size
