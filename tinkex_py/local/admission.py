"""How much work that was accepted may wait at once."""


class Admission:
    """Requests that wait, counted and in bytes. Lives on the event loop.

    Args:
        what: says what they wait for.
        max_requests: how many may wait.
        max_bytes: how many bytes of bodies may wait; a single request may be larger.
    """

    def __init__(self, what: str, max_requests: int, max_bytes: int) -> None:
        self._what = what
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.requests = 0
        self.bytes = 0

    def refusal(self, size: int) -> str | None:
        """Why a request of so many bytes has to come back later; None if it may wait here."""
        if self.requests >= self._max_requests:
            return f"{self.requests} requests {self._what} already: come back in a second"
        if self.bytes and self.bytes + size > self._max_bytes:
            return f"requests of {self.bytes} bytes {self._what} already: come back in a second"
        return None

    def enter(self, size: int) -> None:
        """One more waits."""
        self.requests += 1
        self.bytes += size

    def leave(self, size: int) -> None:
        """One less waits."""
        self.requests -= 1
        self.bytes -= size
