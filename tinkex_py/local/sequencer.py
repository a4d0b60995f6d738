"""The order of one training model's requests: strictly by number, whatever order they arrive in."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

NAMED_GAPS = 3


@dataclass(frozen=True)
class Receipt:
    """What a number was used for."""

    digest: bytes
    request_id: str


class Sequencer:
    """Starts requests when all earlier numbers were started or are spent.

    Attributes:
        next_number: the number that would start at once.
    """

    def __init__(self) -> None:
        self.next_number = 1
        self.receipts: dict[int, Receipt] = {}
        self._waiting: dict[int, Callable[[], None] | None] = {}

    def is_spent(self, number: int) -> bool:
        """Whether a number was used by something that left no receipt."""
        return number not in self.receipts and (number < self.next_number or number in self._waiting)

    def gap(self, number: int) -> str | None:
        """Which numbers a request still waits for because they have not come; None if it waits for none."""
        missing = (earlier for earlier in range(self.next_number, number) if earlier not in self._waiting)
        named = [str(earlier) for earlier in islice(missing, NAMED_GAPS + 1)]
        if not named:
            return None
        more = " and later ones" if len(named) > NAMED_GAPS else ""
        return f"seq_id {number} waits for seq_id {', '.join(named[:NAMED_GAPS])}{more}, not received yet"

    def enter(self, number: int, receipt: Receipt, start: Callable[[], None]) -> None:
        """Take a place; `start` is called when its turn comes, which may be now."""
        self.receipts[number] = receipt
        self._waiting[number] = start
        self._advance()

    def spend(self, number: int) -> None:
        """A refused request still uses its number up, else everything behind it would wait for ever."""
        if number >= self.next_number and number not in self._waiting:
            self._waiting[number] = None
            self._advance()

    def release(self) -> None:
        """Start everything that waits, in order: the missing numbers will never come."""
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
