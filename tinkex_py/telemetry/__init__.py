"""What happens inside, observable from outside.

Every unit of work emits one start event and then exactly one stop or exception event. `attach` hands events
to a function, `attach_logger` writes them as log lines; a process that asked for neither, and configured
neither structlog nor logging, sees nothing.

Events belong to the thread of the event loop: call `emit` and `lifecycle` there only.
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
