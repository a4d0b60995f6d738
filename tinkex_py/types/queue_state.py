"""What a service says about requests that it has not begun."""

from dataclasses import dataclass
from typing import Literal, cast

QueueStateName = Literal["active", "paused_capacity", "paused_rate_limit", "unknown"]
_KNOWN = ("active", "paused_capacity", "paused_rate_limit")


@dataclass(frozen=True, slots=True)
class QueueState:
    """Whether the service works on a client's requests.

    Attributes:
        state: "active", "paused_capacity" (it is full), "paused_rate_limit" (the account's limit), or "unknown" for
            a state that this version does not know.
        reason: the service's own words, if it gave any.
        since: Unix time in seconds at which this was heard first.
        source: model id of the training client, or id of the sampling session.
    """

    state: QueueStateName
    reason: str | None
    since: float
    source: str


def queue_state_name(told: object) -> QueueStateName:
    """The state that a service tells; "unknown" for what this version does not know."""
    return cast("QueueStateName", told) if told in _KNOWN else "unknown"
