"""The numbers that `tinkex_py.integrations.opentelemetry` reports as metrics."""

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from tinkex_py.telemetry import Event

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, Meter

_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_WAITING: Final = frozenset({"paused_capacity", "paused_rate_limit", "unknown"})
_TERM: Final = "tinkex.term.name"
_MODEL: Final = "tinkex.model_id"
_UNITS: Final = ("run.step", "training", "custom_loss", "term", "http", "future")

Attributes = dict[str, str | int]


class Instruments:
    """Histograms, counters and gauges. Times in seconds.

    | instrument | kind | attributes |
    | --- | --- | --- |
    | `tinkex.run.step.duration` | histogram | error |
    | `tinkex.training.duration` | histogram | operation, error |
    | `tinkex.custom_loss.duration` | histogram | error |
    | `tinkex.term.duration` | histogram | term, error |
    | `tinkex.http.duration` | histogram | `http.request.method`, endpoint, `http.response.status_code`, error |
    | `tinkex.future.duration` | histogram | request type, error |
    | `tinkex.queue.wait` | histogram | request type |
    | `tinkex.http.retries` | counter | endpoint |
    | `tinkex.term.retries` | counter | term |
    | `tinkex.loss.total`, `tinkex.loss.regularizers` | gauge | model |
    | `tinkex.term.value`, `tinkex.term.contribution`, `tinkex.term.grad_norm` | gauge | model, term |

    The attributes are `tinkex.operation`, `tinkex.term.name`, `tinkex.endpoint`, `tinkex.request_type`,
    `tinkex.model_id`, and `error.type`, which is there only for what failed. A queue wait is the part of a request's
    life in which the service said that it waits for its turn; 0 for a request of which it never said so.

    Args:
        meter: makes the instruments.
    """

    def __init__(self, meter: "Meter") -> None:
        self._durations = {unit: _histogram(meter, f"tinkex.{unit}.duration") for unit in _UNITS}
        self._queue_wait = _histogram(meter, "tinkex.queue.wait")
        self._http_retries = meter.create_counter("tinkex.http.retries", description="HTTP requests that were repeats")
        self._term_retries = meter.create_counter("tinkex.term.retries", description="Repeated calls of terms")
        self._losses = {
            "loss_total": meter.create_gauge("tinkex.loss.total", description="The composed loss"),
            "regularizer_total": meter.create_gauge("tinkex.loss.regularizers", description="Sum of the contributions"),
        }
        self._terms = {
            "value": meter.create_gauge("tinkex.term.value", description="A regularizer's own loss"),
            "contribution": meter.create_gauge("tinkex.term.contribution", description="Weight times value"),
            "grad_norm": meter.create_gauge("tinkex.term.grad_norm", description="Unweighted gradient norm"),
        }
        self._queues: dict[object, _QueueStates] = {}

    def hear(self, event: Event, model_id: str | None) -> None:
        """Takes in one event.

        Args:
            event: any.
            model_id: of the training client that it happened for, if it did for one.
        """
        given = event.metadata
        failed: Attributes = {"error.type": str(given["reason"])} if event.name.endswith(".exception") else {}
        seconds: Any = event.measurements.get("duration")
        match event.name.removeprefix("tinkex.").split("."):
            case ["run", "step", "stop" | "exception"]:
                self._durations["run.step"].record(seconds, failed)
            case ["training", "stop" | "exception"]:
                self._durations["training"].record(seconds, {"tinkex.operation": given["operation"], **failed})
            case ["custom_loss", "stop" | "exception" as phase]:
                self._durations["custom_loss"].record(seconds, failed)
                if phase == "stop":
                    _set(self._losses, event.measurements, _of_model(model_id))
            case ["regularizer", "compute", "stop" | "exception" as phase]:
                name: Attributes = {_TERM: given["regularizer_name"]}
                self._durations["term"].record(seconds, {**name, **failed})
                if phase == "stop":
                    _set(self._terms, event.measurements, {**name, **_of_model(model_id)})
            case ["regularizer", "retry"]:
                self._term_retries.add(1, {_TERM: given["regularizer_name"]})
            case ["http", "request", "start"] if given["attempt"] > 1:
                self._http_retries.add(1, {"tinkex.endpoint": endpoint(given["path"])})
            case ["http", "request", "stop" | "exception"]:
                self._durations["http"].record(seconds, {**_of_request(event), **failed})
            case ["future", phase]:
                self._hear_future(event, phase, failed)
            case _:
                return

    def _hear_future(self, event: Event, phase: str, failed: Attributes) -> None:
        key = (asyncio.current_task(), event.metadata["request_id"])
        request_type: Attributes = {"tinkex.request_type": event.metadata["request_type"]}
        if phase == "start":
            self._queues[key] = _QueueStates()
        elif phase == "queue_state":
            if key in self._queues:
                self._queues[key].turn(waiting=event.metadata["queue_state"] in _WAITING)
        else:
            self._durations["future"].record(event.measurements["duration"], {**request_type, **failed})
            queue = self._queues.pop(key, None)
            if queue is not None:
                queue.turn(waiting=False)
                self._queue_wait.record(queue.waited, request_type)


class _QueueStates:
    """How long one request has been told that it waits for its turn, in seconds."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._since: float | None = None

    def turn(self, *, waiting: bool) -> None:
        now = time.monotonic()
        if self._since is not None:
            self.waited += now - self._since
        self._since = now if waiting else None


def endpoint(path: str) -> str:
    """What a path asks for, without the ids in it: "forward_backward" of `/prefix/api/v1/forward_backward`."""
    _, found, below = path.partition("/api/v1/")
    return (below if found else path.lstrip("/")).partition("/")[0]


def _of_request(event: Event) -> Attributes:
    attributes: Attributes = {
        "http.request.method": event.metadata["method"],
        "tinkex.endpoint": endpoint(event.metadata["path"]),
    }
    status = event.measurements.get("status")
    return attributes if status is None else {**attributes, "http.response.status_code": status}


def _of_model(model_id: str | None) -> Attributes:
    return {} if model_id is None else {_MODEL: model_id}


def _set(gauges: Mapping[str, Any], measurements: Mapping[str, Any], attributes: Attributes) -> None:
    for name, gauge in gauges.items():
        value = measurements.get(name)
        if value is not None:
            gauge.set(value, attributes)


def _histogram(meter: "Meter", name: str) -> "Histogram":
    return meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=_SECONDS)
