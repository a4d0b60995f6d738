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
from collections.abc import Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from tinkex_py import telemetry
from tinkex_py.arguments import check_flag, check_kind
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
    "bound": "tinkex.term.bound",
    "bytes": "http.response.body.size",
    "contribution": "tinkex.term.contribution",
    "controller": "tinkex.controller",
    "feasible": "tinkex.term.feasible",
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
    "surrogate": "tinkex.surrogate",
    "total_grad_norm": "tinkex.grad_norm.total",
    "value": "tinkex.term.value",
    "violation": "tinkex.term.violation",
    "weight": "tinkex.term.weight",
}


# Histogram of the duration of each unit of work, and the metadata that become its attributes.
_DURATIONS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "tinkex.run.step": ("tinkex.run.step.duration", ()),
    "tinkex.training": ("tinkex.training.duration", ("operation",)),
    "tinkex.custom_loss": ("tinkex.custom_loss.duration", ()),
    "tinkex.regularizer.compute": ("tinkex.term.duration", ("regularizer_name",)),
    "tinkex.http.request": ("tinkex.http.duration", ("method", "path", "status")),
    "tinkex.future": ("tinkex.future.duration", ("request_type",)),
}
# Measurements of two units of work that become gauges.
_GAUGES: Final[Mapping[str, Mapping[str, str]]] = {
    "tinkex.custom_loss": {"loss_total": "The composed loss", "regularizer_total": "Sum of the contributions"},
    "tinkex.regularizer.compute": {
        "value": "A regularizer's own loss",
        "contribution": "Weight times value",
        "grad_norm": "Unweighted gradient norm",
        "violation": "How far the value is beyond its bound",
    },
}
_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds
_QUEUED: Final = frozenset({"paused_capacity", "paused_rate_limit", "unknown"})

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

    The guide to this integration lists the metrics and their attributes.

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
        if tracer_provider is not None:
            check_kind("tracer_provider", tracer_provider, TracerProvider)
        if meter_provider is not None:
            check_kind("meter_provider", meter_provider, MeterProvider)
        check_flag("propagate", propagate)
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
    """Records events as metrics."""

    def __init__(self, meter: Meter) -> None:
        self._durations = {unit: _histogram(meter, name) for unit, (name, _) in _DURATIONS.items()}
        self._queue_wait = _histogram(meter, "tinkex.queue.wait")
        self._http_retries = meter.create_counter("tinkex.http.retries", description="Repeated HTTP requests")
        self._term_retries = meter.create_counter("tinkex.term.retries", description="Repeated calls of terms")
        self._gauges = {
            key: meter.create_gauge(_ATTRIBUTES[key], description=description)
            for descriptions in _GAUGES.values()
            for key, description in descriptions.items()
        }
        self._queues: dict[object, _QueueWait] = {}

    def record(self, event: Event, model_id: str | None) -> None:
        """Records one event; `model_id` is that of its training client, if it has one."""
        unit, _, phase = event.name.rpartition(".")
        if event.name == "tinkex.regularizer.retry":
            self._term_retries.add(1, _labels(event, ("regularizer_name",)))
        elif event.name == "tinkex.http.request.start" and event.metadata["attempt"] > 1:
            self._http_retries.add(1, _labels(event, ("path",)))
        elif phase in ("stop", "exception") and unit in _DURATIONS:
            labels = _labels(event, _DURATIONS[unit][1])
            failed: Attributes = {"error.type": str(event.metadata["reason"])} if phase == "exception" else {}
            self._durations[unit].record(event.measurements["duration"], {**labels, **failed})
            if phase == "stop":
                self._set_gauges(unit, event, labels if model_id is None else {**labels, "tinkex.model_id": model_id})
        if unit == "tinkex.future":
            self._record_queue(event, phase)

    def _set_gauges(self, unit: str, event: Event, labels: Attributes) -> None:
        for key in _GAUGES.get(unit, ()):
            value = event.measurements.get(key)
            if value is not None:
                self._gauges[key].set(value, labels)

    def _record_queue(self, event: Event, phase: str) -> None:
        key = (asyncio.current_task(), event.metadata["request_id"])
        if phase == "start":
            self._queues[key] = _QueueWait()
        elif key not in self._queues:  # started before this was attached
            return
        elif phase == "queue_state":
            self._queues[key].update(queued=event.metadata["queue_state"] in _QUEUED)
        else:
            queue = self._queues.pop(key)
            queue.update(queued=False)
            self._queue_wait.record(queue.seconds, _labels(event, ("request_type",)))


class _QueueWait:
    """Seconds during which the service reported one request as queued."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def update(self, *, queued: bool) -> None:
        now = time.monotonic()
        if self._since is not None:
            self.seconds += now - self._since
        self._since = now if queued else None


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


def _labels(event: Event, keys: Sequence[str]) -> Attributes:
    given = {**event.measurements, **event.metadata}
    labels: Attributes = {_ATTRIBUTES[key]: given[key] for key in keys if given.get(key) is not None and key != "path"}
    return {**labels, "tinkex.endpoint": endpoint(given["path"])} if "path" in keys else labels


def _histogram(meter: Meter, name: str) -> Histogram:
    return meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=_BUCKETS)
