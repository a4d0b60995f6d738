"""Admission of requests: how much may wait, and the order of one training model's requests."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

NAMED_GAPS = 3


class Admission:
    """Bounds the requests that wait, by number and by bytes. Lives on the event loop.

    Args:
        what: what the requests wait for, for messages.
        max_requests: maximum number of waiting requests.
        max_bytes: maximum size of their bodies; a single request may be larger.
    """

    def __init__(self, what: str, max_requests: int, max_bytes: int) -> None:
        self._what = what
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.requests = 0
        self.bytes = 0

    def refusal(self, size: int) -> str | None:
        """Returns why a request of `size` bytes is refused, or None if it may wait."""
        if self.requests >= self._max_requests:
            return f"{self.requests} requests {self._what} already: retry in a second"
        if self.bytes and self.bytes + size > self._max_bytes:
            return f"requests of {self.bytes} bytes {self._what} already: retry in a second"
        return None

    def enter(self, size: int) -> None:
        """Counts a request that starts to wait."""
        self.requests += 1
        self.bytes += size

    def leave(self, size: int) -> None:
        """Uncounts a request that no longer waits."""
        self.requests -= 1
        self.bytes -= size


@dataclass(frozen=True)
class Receipt:
    """The request that used a number."""

    digest: bytes
    request_id: str


class Sequencer:
    """Starts the requests of one training model strictly by number, in whatever order they arrive.

    Attributes:
        next_number: the number that starts at once.
        receipts: requests by their number.
    """

    def __init__(self) -> None:
        self.next_number = 1
        self.receipts: dict[int, Receipt] = {}
        self._waiting: dict[int, Callable[[], None] | None] = {}

    @property
    def waiting(self) -> int:
        """Number of requests and spent numbers that wait for earlier numbers."""
        return len(self._waiting)

    def is_spent(self, number: int) -> bool:
        """Whether a request without a receipt used the number."""
        return number not in self.receipts and (number < self.next_number or number in self._waiting)

    def gap(self, number: int) -> str | None:
        """Returns which missing numbers a request waits for, or None if there are none."""
        missing = (earlier for earlier in range(self.next_number, number) if earlier not in self._waiting)
        named = [str(earlier) for earlier in islice(missing, NAMED_GAPS + 1)]
        if not named:
            return None
        more = " and later ones" if len(named) > NAMED_GAPS else ""
        return f"seq_id {number} waits for seq_id {', '.join(named[:NAMED_GAPS])}{more}, not received yet"

    def enter(self, number: int, receipt: Receipt, start: Callable[[], None]) -> None:
        """Adds a request; calls `start` as soon as all earlier numbers have started, which may be now."""
        self.receipts[number] = receipt
        self._waiting[number] = start
        self._advance()

    def spend(self, number: int) -> None:
        """Uses up the number of a refused request, because later numbers would wait for it forever."""
        if number >= self.next_number and number not in self._waiting:
            self._waiting[number] = None
            self._advance()

    def release(self) -> None:
        """Starts all waiting requests in order, although numbers are missing."""
        for number in sorted(self._waiting):
            start = self._waiting.pop(number)
            if start is not None:
                start()

    def _advance(self) -> None:
        while self.next_number in self._waiting:
            start = self._waiting.pop(self.next_number)
            self.next_number += 1
            if start is not None:
                start()
