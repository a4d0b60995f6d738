"""The queue state that services report for pending requests."""

from dataclasses import dataclass
from typing import Literal, cast

QueueStateName = Literal["active", "paused_capacity", "paused_rate_limit", "unknown"]
_KNOWN = ("active", "paused_capacity", "paused_rate_limit")


@dataclass(frozen=True, slots=True)
class QueueState:
    """Whether the service processes a client's requests.

    Attributes:
        state: "active", "paused_capacity" (the service is full), "paused_rate_limit" (the account's limit), or
            "unknown" for a state that this version does not support.
        reason: the service's explanation, or None.
        since: Unix time in seconds at which this state was first reported.
        source: model id of the training client, or id of the sampling session.
    """

    state: QueueStateName
    reason: str | None
    since: float
    source: str


def queue_state_name(reported: object) -> QueueStateName:
    """Returns the state that a service reports; "unknown" for one that this version does not support."""
    return cast("QueueStateName", reported) if reported in _KNOWN else "unknown"
