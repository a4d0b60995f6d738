"""OpenTelemetry: spans and metrics from the events of `tinkex_py.telemetry`.

    with OpenTelemetry():  # the global providers of the process
        await training.forward_backward_custom(...)

A step is one trace: the call of the client, the composed loss in it, the terms in that, and the HTTP requests
wherever they are made. The context goes to the service in the W3C header `traceparent`.

Nothing of the data goes along: no text, no tokens, no key, no message of an error, only its class.
"""

import asyncio
import threading
from collections.abc import Mapping
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from tinkex_py import telemetry
from tinkex_py.errors import MissingExtra
from tinkex_py.integrations.opentelemetry_metrics import Instruments, endpoint
from tinkex_py.telemetry import Event
from tinkex_py.version import __version__

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    raise MissingExtra("opentelemetry", "opentelemetry") from error

_SCOPE: Final = "tinkex_py"
_CANCELLED: Final = "CancelledError"
_NOT_YET: Final = 408  # how services answer a poll whose result is not there yet
_MODEL_KEY: Final = context.create_key("tinkex.model_id")
_TRACE_CONTEXT: Final = TraceContextTextMapPropagator()

# What spans tell, by the names of the events' measurements and metadata. What is not here stays here.
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


@dataclass(frozen=True)
class _Open:
    """A span that has not ended, and how to leave its context again in the task that entered it."""

    span: Span
    token: Token[Context]
    task: asyncio.Task[Any] | None


class OpenTelemetry:
    """Turns events into spans and metrics while it is attached. Use it with `with`, or `attach` and `detach`.

    Spans are children of whatever span is current where the call is made, and current themselves while their work
    runs, in terms too, on the loop and in threads. Work that outlives its parent, such as the heartbeat of a session,
    starts a trace of its own with a link to it.

    Args:
        tracer_provider: makes the spans; None is the process's own.
        meter_provider: makes the metrics; None is the process's own. They are those of
            `tinkex_py.integrations.opentelemetry_metrics.Instruments`.
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
        self._instruments = Instruments(metrics.get_meter(_SCOPE, __version__, meter_provider))
        self._propagate = propagate
        self._handler_id: str | None = None
        self._open: dict[int, _Open] = {}
        self._lock = threading.Lock()

    def attach(self) -> Self:
        """Starts listening; does nothing if it listens already."""
        with self._lock:
            if self._handler_id is None:
                headers = _trace_headers if self._propagate else None
                self._handler_id = telemetry.attach(self._hear, request_headers=headers)
        return self

    def detach(self) -> None:
        """Stops listening, and ends the spans of work that is still under way."""
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

    def _hear(self, event: Event) -> None:
        self._instruments.hear(event, _current_model())
        if event.unit is None:
            _current_span().add_event(event.name, _attributes(event))
        elif event.name.endswith(".start"):
            self._begin(event.unit, event)
        else:
            self._end(event.unit, event)

    def _begin(self, unit: int, event: Event) -> None:
        parent = context.get_current()
        outlived = trace.get_current_span(parent) if _has_ended(trace.get_current_span(parent)) else None
        if outlived is not None:
            parent = trace.set_span_in_context(INVALID_SPAN, parent)
        span = self._tracer.start_span(
            _span_name(event),
            parent,
            kind=SpanKind.CLIENT if _is_http(event) else SpanKind.INTERNAL,
            attributes=_attributes(event),
            links=[Link(outlived.get_span_context())] if outlived is not None else [],
        )
        inside = trace.set_span_in_context(span, parent)
        if "model_id" in event.metadata:
            inside = context.set_value(_MODEL_KEY, event.metadata["model_id"], inside)
        with self._lock:
            if self._handler_id is None:  # detached meanwhile by another thread
                span.end()
                return
            self._open[unit] = _Open(span, context.attach(inside), _current_task())

    def _end(self, unit: int, event: Event) -> None:
        with self._lock:
            opened = self._open.pop(unit, None)
        if opened is None:  # it began before this was attached
            return
        # An abandoned generator is closed by another task, which has nothing to leave.
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
    told = {**event.measurements, **event.metadata}
    return {name: told[key] for key, name in _ATTRIBUTES.items() if told.get(key) is not None}


def _failure(event: Event) -> str | None:
    """The class of the error, or the HTTP status that tells of one."""
    if "reason" in event.metadata:
        return str(event.metadata["reason"])
    status = event.measurements.get("status") or 0
    return str(status) if status >= 400 and status != _NOT_YET else None


def _current_model() -> str | None:
    model_id = context.get_value(_MODEL_KEY)
    return model_id if isinstance(model_id, str) else None


def _current_span() -> Span:
    return trace.get_current_span()


def _has_ended(span: Span) -> bool:
    return getattr(span, "end_time", None) is not None  # the API cannot tell; the SDK's spans know


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
