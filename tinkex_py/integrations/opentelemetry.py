"""OpenTelemetry: spans and metrics from the events of `tinkex_py.telemetry`.

    with OpenTelemetry():  # the global providers of the process
        await training.forward_backward_custom(...)

A step is one trace: the call of the client contains the composed loss, which contains the terms; HTTP requests are
children of what sends them. The service receives the context in the W3C header `traceparent`.

No data is exported: no text, no tokens, no key, and of an error only its class.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from tinkex_py import telemetry
from tinkex_py.errors import MissingExtra
from tinkex_py.telemetry import Event
from tinkex_py.version import __version__

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import Histogram, Meter, MeterProvider
    from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    raise MissingExtra("opentelemetry", "opentelemetry") from error

_SCOPE: Final = "tinkex_py"
_CANCELLED: Final = "CancelledError"
_NOT_YET: Final = 408  # the response to a poll whose result is not ready
_MODEL_KEY: Final = context.create_key("tinkex.model_id")
_TRACE_CONTEXT: Final = TraceContextTextMapPropagator()

# Exported attributes of spans, by the names of measurements and metadata of events. Nothing else is exported.
_ATTRIBUTES: Final[Mapping[str, str]] = {
    "attempt": "tinkex.attempt",
    "bytes": "http.response.body.size",
    "carrier": "tinkex.carrier",
    "contribution": "tinkex.term.contribution",
    "controller": "tinkex.controller",
    "grad_norm": "tinkex.term.grad_norm",
    "is_async": "tinkex.term.is_async",
    "loss_total": "tinkex.loss.total",
    "method": "http.request.method",
    "model_id": "tinkex.model_id",
    "operation": "tinkex.operation",
    "path": "url.path",
    "pause": "tinkex.pause",
    "paused": "tinkex.paused",
    "queue_state": "tinkex.queue_state",
    "regularizer_count": "tinkex.regularizer_count",
    "regularizer_name": "tinkex.term.name",
    "regularizer_total": "tinkex.loss.regularizers",
    "request_id": "tinkex.request_id",
    "request_type": "tinkex.request_type",
    "status": "http.response.status_code",
    "step": "tinkex.step",
    "total_grad_norm": "tinkex.grad_norm.total",
    "value": "tinkex.term.value",
    "weight": "tinkex.term.weight",
}


_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds
_WAITING: Final = frozenset({"paused_capacity", "paused_rate_limit", "unknown"})
_TERM: Final = "tinkex.term.name"

Attributes = dict[str, str | int]


@dataclass(frozen=True)
class _OpenSpan:
    """A span in progress, with the token and the task that its context must be detached in."""

    span: Span
    token: Token[Context]
    task: asyncio.Task[Any] | None


class OpenTelemetry:
    """Converts events to spans and metrics while it is attached. Use it with `with`, or `attach` and `detach`.

    A span is a child of the span that is current where the call is made, and is itself current while its work runs, in
    terms too, on the loop and in threads. Work that outlives its parent, such as the heartbeat of a session, starts a
    new trace with a link to it.

    Metrics, with times in seconds:

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

    Their attributes are `tinkex.operation`, `tinkex.term.name`, `tinkex.endpoint`, `tinkex.request_type`,
    `tinkex.model_id`, and, for failures only, `error.type`. A queue wait is the time during which the service reported
    a request as queued; 0 if it never did.

    Args:
        tracer_provider: creates the spans; None uses that of the process.
        meter_provider: creates the metrics; None uses that of the process.
        propagate: send the W3C headers `traceparent` and `tracestate` to the service, never to another origin.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        propagate: bool = True,
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, __version__, tracer_provider)
        self._instruments = _Instruments(metrics.get_meter(_SCOPE, __version__, meter_provider))
        self._propagate = propagate
        self._handler_id: str | None = None
        self._open: dict[int, _OpenSpan] = {}
        self._lock = threading.Lock()

    def attach(self) -> Self:
        """Attaches to the events; does nothing if it is attached."""
        with self._lock:
            if self._handler_id is None:
                headers = _trace_headers if self._propagate else None
                self._handler_id = telemetry.attach(self._handle, request_headers=headers)
        return self

    def detach(self) -> None:
        """Detaches, and ends the spans of work in progress."""
        with self._lock:
            if self._handler_id is not None:
                telemetry.detach(self._handler_id)
            self._handler_id = None
            left, self._open = self._open, {}
        for opened in left.values():
            opened.span.set_attribute("tinkex.detached", True)
            opened.span.end()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _handle(self, event: Event) -> None:
        self._instruments.record(event, _current_model())
        if event.unit is None:
            trace.get_current_span().add_event(event.name, _attributes(event))
        elif event.name.endswith(".start"):
            self._begin(event.unit, event)
        else:
            self._end(event.unit, event)

    def _begin(self, unit: int, event: Event) -> None:
        parent = context.get_current()
        links: list[Link] = []
        current = trace.get_current_span(parent)
        if getattr(current, "end_time", None) is not None:  # only spans of the SDK have it
            links.append(Link(current.get_span_context()))
            parent = trace.set_span_in_context(INVALID_SPAN, parent)
        span = self._tracer.start_span(
            _span_name(event),
            parent,
            kind=SpanKind.CLIENT if _is_http(event) else SpanKind.INTERNAL,
            attributes=_attributes(event),
            links=links,
        )
        inside = trace.set_span_in_context(span, parent)
        if "model_id" in event.metadata:
            inside = context.set_value(_MODEL_KEY, event.metadata["model_id"], inside)
        with self._lock:
            if self._handler_id is None:  # another thread has detached it
                span.end()
                return
            self._open[unit] = _OpenSpan(span, context.attach(inside), _current_task())

    def _end(self, unit: int, event: Event) -> None:
        with self._lock:
            opened = self._open.pop(unit, None)
        if opened is None:  # started before this was attached
            return
        # Another task closes an abandoned generator; the token is not valid there.
        if opened.task is _current_task() and trace.get_current_span() is opened.span:
            context.detach(opened.token)
        opened.span.set_attributes(_attributes(event))
        failure = _failure(event)
        if failure == _CANCELLED:
            opened.span.set_attribute("tinkex.cancelled", True)
        elif failure is not None:
            opened.span.set_attribute("error.type", failure)
            opened.span.set_status(Status(StatusCode.ERROR, failure))
        opened.span.end()


class _Instruments:
    """The instruments of the table above."""

    def __init__(self, meter: Meter) -> None:
        units = ("run.step", "training", "custom_loss", "term", "http", "future")
        self._durations = {unit: _histogram(meter, f"tinkex.{unit}.duration") for unit in units}
        self._queue_wait = _histogram(meter, "tinkex.queue.wait")
        self._http_retries = meter.create_counter("tinkex.http.retries", description="Repeated HTTP requests")
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
        self._queues: dict[object, _QueueWait] = {}

    def record(self, event: Event, model_id: str | None) -> None:
        """Records one event; `model_id` is that of its training client, if it has one."""
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
                self._record_future(event, phase, failed)
            case _:
                return

    def _record_future(self, event: Event, phase: str, failed: Attributes) -> None:
        key = (asyncio.current_task(), event.metadata["request_id"])
        request_type: Attributes = {"tinkex.request_type": event.metadata["request_type"]}
        if phase == "start":
            self._queues[key] = _QueueWait()
        elif phase == "queue_state":
            if key in self._queues:
                self._queues[key].update(waiting=event.metadata["queue_state"] in _WAITING)
        else:
            self._durations["future"].record(event.measurements["duration"], {**request_type, **failed})
            queue = self._queues.pop(key, None)
            if queue is not None:
                queue.update(waiting=False)
                self._queue_wait.record(queue.seconds, request_type)


class _QueueWait:
    """Seconds during which the service reported one request as queued."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def update(self, *, waiting: bool) -> None:
        now = time.monotonic()
        if self._since is not None:
            self.seconds += now - self._since
        self._since = now if waiting else None


def _trace_headers() -> dict[str, str]:
    headers: dict[str, str] = {}
    _TRACE_CONTEXT.inject(headers)
    return headers


def _is_http(event: Event) -> bool:
    return event.name.startswith("tinkex.http.")


def _span_name(event: Event) -> str:
    given = event.metadata
    if _is_http(event):
        return f"{given['method']} {endpoint(given['path'])}"
    unit = event.name.removesuffix(".start")
    detail = given.get("operation") or given.get("regularizer_name") or given.get("request_type")
    return f"{unit} {detail}" if detail else unit


def _attributes(event: Event) -> dict[str, Any]:
    given = {**event.measurements, **event.metadata}
    return {name: given[key] for key, name in _ATTRIBUTES.items() if given.get(key) is not None}


def _failure(event: Event) -> str | None:
    """Returns the class of the error, or the HTTP status that reports one."""
    if "reason" in event.metadata:
        return str(event.metadata["reason"])
    status = event.measurements.get("status") or 0
    return str(status) if status >= 400 and status != _NOT_YET else None


def _current_model() -> str | None:
    model_id = context.get_value(_MODEL_KEY)
    return model_id if isinstance(model_id, str) else None


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def endpoint(path: str) -> str:
    """Returns the endpoint of a path, without ids: "forward_backward" of `/prefix/api/v1/forward_backward`."""
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
    return {} if model_id is None else {"tinkex.model_id": model_id}


def _set(gauges: Mapping[str, Any], measurements: Mapping[str, Any], attributes: Attributes) -> None:
    for name, gauge in gauges.items():
        value = measurements.get(name)
        if value is not None:
            gauge.set(value, attributes)


def _histogram(meter: Meter, name: str) -> Histogram:
    return meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=_BUCKETS)
