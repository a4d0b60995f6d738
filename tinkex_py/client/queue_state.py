"""The queue state of one client, as reported by the service."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from tinkex_py.types.queue_state import QueueState, queue_state_name

_LOGGER = logging.getLogger("tinkex_py")


class QueueWatch:
    """The queue state of one training or sampling client.

    Args:
        source: the client's model id or sampling session.
        callback: called on every change.
        check: called with the reason that the service reports; may raise.
    """

    def __init__(
        self,
        source: str,
        callback: Callable[[QueueState], object] | None,
        check: Callable[[str], None] | None = None,
    ) -> None:
        self._callback = callback
        self._check = check
        self.state = QueueState("active", None, time.time(), source)
        self.is_waiting = False

    def pending(self, fields: Mapping[str, Any]) -> None:
        """Reads the response for a pending request."""
        given = fields.get("queue_state")
        reason = fields.get("queue_state_reason")
        reason = reason if isinstance(reason, str) and reason else None
        if given is not None:
            self._change(queue_state_name(given), reason)
        if reason is not None and self._check is not None:
            self._check(reason)

    def done(self) -> None:
        """Records that the service completed a request."""
        self._change("active", None)

    def _change(self, state: Any, reason: str | None) -> None:
        before = self.state
        if (state, reason) == (before.state, before.reason):
            return
        self.state = QueueState(state, reason, time.time(), before.source)
        self.is_waiting = state != "active" or reason is not None
        if self._callback is None:
            return
        try:
            self._callback(self.state)
        except Exception as error:  # noqa: BLE001  (user code must not break training)
            self._callback = None
            _LOGGER.warning("on_queue_state raised %s and is not called again", type(error).__name__)
