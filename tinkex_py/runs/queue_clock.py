"""Measures how long the requests of one run wait for their turn on the service, and tells why."""

import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType

from tinkex_py import telemetry
from tinkex_py.telemetry import Event

_EVENTS = ("tinkex.future.queue_state", "tinkex.future.stop", "tinkex.future.exception")
_WORDS = {"paused_capacity": "the service is full", "paused_rate_limit": "the account's rate limit is reached"}

# The run whose code is running: its tasks inherit it, so that two runs in one process are told apart.
_clock: ContextVar["QueueClock | None"] = ContextVar("tinkex_run_clock", default=None)


class QueueClock:
    """Hears what the service says about requests that were made inside the `with` block.

    Args:
        on_change: called with the reason when requests begin to wait, and with None when none waits any more.
    """

    def __init__(self, on_change: Callable[[str | None], None]) -> None:
        self._on_change = on_change
        self._waiting: dict[str, str] = {}
        self._since = 0.0
        self._before = 0.0
        self._handler_id = ""
        self._token: Token[QueueClock | None] | None = None

    @property
    def seconds(self) -> float:
        """How long at least one request has waited so far."""
        running = time.monotonic() - self._since if self._waiting else 0.0
        return self._before + running

    def __enter__(self) -> "QueueClock":
        self._token = _clock.set(self)
        self._handler_id = telemetry.attach(self._hear, events=_EVENTS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        telemetry.detach(self._handler_id)
        if self._token is not None:
            _clock.reset(self._token)
            self._token = None

    def _hear(self, event: Event) -> None:
        if _clock.get() is not self:
            return
        request = str(event.metadata["request_id"])
        state = str(event.metadata.get("queue_state", "active"))
        if state == "active":
            self._end(request)
        else:
            self._begin(request, state, event.metadata.get("queue_state_reason"))

    def _begin(self, request: str, state: str, told: object) -> None:
        reason = _WORDS.get(state, state)
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting[request] = f"{reason} ({told})" if told else reason
        self._on_change(self._waiting[request])

    def _end(self, request: str) -> None:
        if self._waiting.pop(request, None) is not None and not self._waiting:
            self._before += time.monotonic() - self._since
            self._on_change(None)
