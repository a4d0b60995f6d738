"""The events: their names, their log levels, and the value that a handler receives."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidData

Measurement = int | float | None
Measurements = dict[str, Measurement]

LIFECYCLES = (
    "tinkex.custom_loss",
    "tinkex.regularizer.compute",
    "tinkex.http.request",
    "tinkex.future",
    "tinkex.session",
    "tinkex.training",
    "tinkex.run.step",
)

_LIFECYCLE_LEVELS = {"start": logging.DEBUG, "stop": logging.DEBUG, "exception": logging.WARNING}

EVENT_LEVELS: Mapping[str, int] = {
    **{f"{prefix}.{phase}": level for prefix in LIFECYCLES for phase, level in _LIFECYCLE_LEVELS.items()},
    "tinkex.custom_loss.not_on_service": logging.INFO,
    "tinkex.custom_loss.surrogate": logging.INFO,
    "tinkex.regularizer.not_differentiable": logging.WARNING,
    "tinkex.regularizer.abandoned": logging.WARNING,
    "tinkex.regularizer.retry": logging.WARNING,
    "tinkex.regularizer.controller_failed": logging.WARNING,
    "tinkex.future.queue_state": logging.INFO,
    "tinkex.session.heartbeat_failed": logging.WARNING,
    "tinkex.session.heartbeat_recovered": logging.INFO,
    "tinkex.session.over": logging.WARNING,
    "tinkex.billing.paused": logging.WARNING,
    "tinkex.sampling.turned_away": logging.DEBUG,
    "tinkex.run.resent": logging.WARNING,
    "tinkex.run.restarted": logging.WARNING,
    "tinkex.run.sink_failed": logging.WARNING,
    "tinkex.run.checkpoint_not_deleted": logging.WARNING,
    "tinkex.run.status_not_written": logging.ERROR,
}


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        name: one of `events()`.
        measurements: numbers. `system_time` is Unix time in seconds, `duration` is in seconds and monotonic;
            None means "not measured".
        metadata: names and ids of the work. For failures, `reason` is the class name of the error.
        exception: the error itself, for exception events.
        unit: number of the unit of work, the same at its start and its end; None for an event without a lifecycle.
    """

    name: str
    measurements: Mapping[str, Any]
    metadata: Mapping[str, Any]
    # Not shown, because its message may come from a user's term.
    exception: BaseException | None = field(default=None, repr=False)
    unit: int | None = None


def events() -> tuple[str, ...]:
    """Returns the names of all events, each lifecycle in the order start, stop, exception."""
    return tuple(EVENT_LEVELS)


def matching_events(patterns: str | Iterable[str] | None) -> frozenset[str]:
    """Returns the event names that match a pattern, one of several patterns, or None (all).

    Args:
        patterns: event names; `*` matches any characters, including dots.

    Raises:
        TypeError: a pattern is not a string.
        InvalidData: a pattern matches no event, or there is no pattern.
    """
    if patterns is None:
        return frozenset(EVENT_LEVELS)
    chosen: set[str] = set()
    several = isinstance(patterns, Iterable) and not isinstance(patterns, str)  # pyright: ignore[reportUnnecessaryIsInstance]
    for pattern in patterns if several else (patterns,):
        if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"events must be event names or patterns, got {shown(pattern)}")
        matched = {name for name in EVENT_LEVELS if fnmatchcase(name, pattern)}
        if not matched:
            raise InvalidData(f"no event matches {pattern!r}; the events are: {', '.join(events())}")
        chosen |= matched
    if not chosen:
        raise InvalidData("events is empty: pass at least one event name, or omit events to receive all of them")
    return frozenset(chosen)
