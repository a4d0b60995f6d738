"""Telemetry events.

Every unit of work emits one start event and then exactly one stop or exception event. `attach` calls a function for
each event, `attach_logger` writes each event as a log line. Without either, and without a configuration of structlog
or logging, nothing is written.

Events are emitted on the thread of the event loop: call `emit` and `lifecycle` only there.
"""

from tinkex_py.telemetry.events import Event, Measurement, Measurements, events
from tinkex_py.telemetry.handlers import (
    Handler,
    attach,
    attach_logger,
    detach,
    emit,
    failure_reason,
    lifecycle,
    request_headers,
)

__all__ = [
    "Event",
    "Handler",
    "Measurement",
    "Measurements",
    "attach",
    "attach_logger",
    "detach",
    "emit",
    "events",
    "failure_reason",
    "lifecycle",
    "request_headers",
]
