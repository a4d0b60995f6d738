"""The process-wide list of handlers, `emit`, which calls them, and `lifecycle`, which emits start and end events."""

import asyncio
import functools
import inspect
import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import structlog

from tinkex_py.arguments import check_function, check_text, shown
from tinkex_py.errors import InvalidData, RegularizerError
from tinkex_py.telemetry.events import EVENT_LEVELS, Event, Measurements, matching_events
from tinkex_py.telemetry.logs import LOGGER, parse_level, would_write, write_line

Handler = Callable[[Event], object]
RequestHeaders = Callable[[], Mapping[str, str]]
Given = TypeVar("Given")
Checked = TypeVar("Checked")


@dataclass(frozen=True, slots=True)
class _Attachment:
    handler_id: str
    handler: Handler
    names: frozenset[str]
    is_logger: bool = False
    request_headers: RequestHeaders | None = None


class _Attachments:
    """The handlers of this process, in the order in which they were attached.

    Writers replace the tuple under the lock, so readers need no lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self.current: tuple[_Attachment, ...] = ()

    def add(
        self,
        handler: Handler,
        names: frozenset[str],
        handler_id: str | None,
        *,
        is_logger: bool = False,
        request_headers: RequestHeaders | None = None,
    ) -> str:
        with self._lock:
            taken = {attachment.handler_id for attachment in self.current}
            if handler_id is None:
                handler_id = next(name for name in map("handler-{}".format, self._numbers) if name not in taken)
            elif check_text("handler_id", handler_id) in taken:
                raise InvalidData(f"handler_id {handler_id!r} is in use: detach it first, or choose another id")
            added = _Attachment(handler_id, handler, names, is_logger, request_headers)
            self.current = (*self.current, added)
            return handler_id

    def remove_id(self, handler_id: str) -> bool:
        return self._keep(lambda attachment: attachment.handler_id != handler_id)

    def remove(self, unwanted: _Attachment) -> bool:
        return self._keep(lambda attachment: attachment is not unwanted)

    def _keep(self, wanted: Callable[[_Attachment], bool]) -> bool:
        with self._lock:
            before = len(self.current)
            self.current = tuple(filter(wanted, self.current))
            return len(self.current) < before


# Metadata of start events that is omitted at the end, as documented in the table of events.
_LEFT_OUT_AT_STOP: Mapping[str, frozenset[str]] = {"tinkex.custom_loss": frozenset({"track_grad_norms"})}
_LEFT_OUT_AT_EXCEPTION: Mapping[str, frozenset[str]] = {
    "tinkex.custom_loss": frozenset({"regularizer_count", "track_grad_norms"}),
    "tinkex.regularizer.compute": frozenset({"is_async"}),
}
_UNITS = itertools.count(1)

_ATTACHMENTS = _Attachments()


def attach(
    handler: Handler,
    *,
    events: str | Iterable[str] | None = None,
    handler_id: str | None = None,
    request_headers: RequestHeaders | None = None,
) -> str:
    """Calls a function for every event.

    Args:
        handler: called with each `Event`, on the thread of the event loop; it should be quick. If it raises, it is
            detached with a warning.
        events: one name, several, patterns such as `"tinkex.regularizer.*"`, or None for all events.
        handler_id: id for `detach`; None generates one.
        request_headers: called inside every HTTP exchange with the service, after its start event. The headers that it
            returns, such as the W3C trace context, are sent with the request; they cannot replace other headers.

    Returns:
        The handler's id.

    Raises:
        TypeError: the handler is not callable, or is a coroutine function.
        InvalidData, which is a ValueError: no event matches, the id is in use, or another argument is invalid.
    """
    _require_plain_function(handler)
    if request_headers is not None:
        check_function("request_headers", request_headers)
    return _ATTACHMENTS.add(handler, matching_events(events), handler_id, request_headers=request_headers)


def attach_logger(*, level: str = "info", handler_id: str | None = None) -> str:
    """Logs every event as one line, until detached.

    The lines go to structlog if it is configured, else to the stdlib logger "tinkex_py"; if no logging is configured,
    they go to stderr.

    Args:
        level: level of the lines: "debug", "info", "warning", "error" or "critical".
        handler_id: id for `detach`; None generates one.

    Returns:
        The handler's id.

    Raises:
        InvalidData: the level is unknown, or the id is in use.
    """
    log = functools.partial(_log_event, level=parse_level(level), asked_for=True)
    return _ATTACHMENTS.add(log, matching_events(None), handler_id, is_logger=True)


def detach(handler_id: str) -> bool:
    """Detaches a handler; returns False if no handler has this id."""
    check_text("handler_id", handler_id)
    return _ATTACHMENTS.remove_id(handler_id)


def emit(
    name: str,
    measurements: Mapping[str, Any],
    metadata: Mapping[str, Any],
    exception: BaseException | None = None,
    *,
    unit: int | None = None,
) -> None:
    """Sends an event to the handlers and the log. Call it on the thread of the event loop only.

    Args:
        name: one of `events()`.
        measurements: numbers, times in seconds.
        metadata: names and ids of the work; no keys, tokens or prompt text.
        exception: the error, for exception events. Handlers receive it; it is never logged.
        unit: number of the unit of work that starts or ends.

    Raises:
        InvalidData: no event has this name, or the measurements or metadata are no mappings.
    """
    level = EVENT_LEVELS.get(name) if isinstance(name, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if level is None:
        raise InvalidData(f"name: unknown event {shown(name)}; the events are: {', '.join(EVENT_LEVELS)}")
    attachments = _ATTACHMENTS.current
    if not attachments and not would_write(level):
        return
    are_mappings = isinstance(measurements, Mapping) and isinstance(metadata, Mapping)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not are_mappings:
        raise InvalidData(
            f"measurements and metadata must be mappings, got {shown(measurements)} and {shown(metadata)}"
        )
    event = Event(name, MappingProxyType(dict(measurements)), MappingProxyType(dict(metadata)), exception, unit)
    for attachment in attachments:
        if name in attachment.names:
            _call(attachment, event)
    if not any(attachment.is_logger for attachment in attachments):
        _log_event(event, level=level)


def failure_reason(error: BaseException) -> str:
    """Returns the class name of an error; for a failed term, the class name of its own exception."""
    if type(error) is RegularizerError and error.__cause__ is not None:
        return type(error.__cause__).__name__
    return type(error).__name__


@contextmanager
def lifecycle(prefix: str, metadata: Mapping[str, Any]) -> Generator[Measurements, None, None]:
    """Emits `<prefix>.start` now, and `<prefix>.stop` or `<prefix>.exception` at the end of the block.

    Use a plain `with`, also around awaits. A cancellation is an exception event with the reason "CancelledError".

    Args:
        prefix: the event's name without its last part, for example "tinkex.http.request".
        metadata: names and ids of the work.

    Yields:
        The measurements of the stop event, which the block fills; `duration` (seconds) is added.

    Raises:
        InvalidData: no event has this prefix, or the metadata are no mapping.
    """
    if not isinstance(prefix, str) or f"{prefix}.start" not in EVENT_LEVELS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"prefix: no event starts with {shown(prefix)}; the events are: {', '.join(EVENT_LEVELS)}")
    if not isinstance(metadata, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"metadata must be a mapping, got {shown(metadata)}")
    measurements: Measurements = {}
    unit = next(_UNITS)
    if _ATTACHMENTS.current or structlog.is_configured() or LOGGER.isEnabledFor(EVENT_LEVELS[f"{prefix}.start"]):
        emit(f"{prefix}.start", {"system_time": time.time()}, metadata, unit=unit)
    started = time.monotonic()
    try:
        yield measurements
    except BaseException as error:
        duration = time.monotonic() - started
        failed = {**_kept(metadata, _LEFT_OUT_AT_EXCEPTION, prefix), "reason": failure_reason(error)}
        emit(f"{prefix}.exception", {"duration": duration}, failed, error, unit=unit)
        raise
    if _ATTACHMENTS.current or structlog.is_configured() or LOGGER.isEnabledFor(EVENT_LEVELS[f"{prefix}.stop"]):
        measurements["duration"] = time.monotonic() - started
        emit(f"{prefix}.stop", measurements, _kept(metadata, _LEFT_OUT_AT_STOP, prefix), unit=unit)


def request_headers() -> dict[str, str]:
    """Returns the headers that handlers add to the next HTTP request, names in lower case."""
    headers: dict[str, str] = {}
    for attachment in _ATTACHMENTS.current:
        if attachment.request_headers is not None:
            headers |= _guarded(attachment, "request_headers", attachment.request_headers, _checked) or {}
    return {name.lower(): value for name, value in headers.items()} if headers else headers


def _kept(metadata: Mapping[str, Any], left_out: Mapping[str, frozenset[str]], prefix: str) -> Mapping[str, Any]:
    unwanted = left_out.get(prefix, frozenset())
    return {key: value for key, value in metadata.items() if key not in unwanted}


def _checked(headers: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in headers.items():
        if not (name.isascii() and value.isascii() and f"{name}{value}".isprintable()) or set(name) & set(" :"):
            raise ValueError("request_headers returned an invalid header")
    return headers


def _require_plain_function(handler: object) -> None:
    if not callable(handler):
        raise TypeError(f"a telemetry handler must be callable, got a {type(handler).__name__}")
    for function in (handler, getattr(handler, "__call__", None)):  # noqa: B004  (an object with async __call__)
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                "a telemetry handler must be a plain function, because it is not awaited, got a coroutine function: "
                "put the event into an asyncio.Queue and await it elsewhere"
            )


def _call(attachment: _Attachment, event: Event) -> None:
    _guarded(attachment, event.name, lambda: attachment.handler(event), _unawaited)


def _guarded(
    attachment: _Attachment, on: str, call: Callable[[], Given], check: Callable[[Given], Checked]
) -> Checked | None:
    """Calls a function of an attachment and checks its result; if it fails, detaches the attachment with a warning."""
    try:
        return check(call())
    # A handler that reads a cancelled asyncio.Future raises CancelledError, which does not cancel this task.
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (a handler must not break training)
        _ATTACHMENTS.remove(attachment)
        fields = {"handler_id": attachment.handler_id, "on": on, "reason": type(error).__name__}
        # `asked_for`: written even without a logging configuration, because the handler receives nothing any more.
        write_line(
            "telemetry handler failed and was detached",
            {**fields, "raised_at": _raised_at(error)},
            logging.WARNING,
            asked_for=True,
        )
        return None


def _unawaited(result: object) -> None:
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError("the handler returned a coroutine, which is not awaited")


def _raised_at(error: BaseException) -> str:
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(innermost.filename).name}:{innermost.lineno}"


def _log_event(event: Event, *, level: int, asked_for: bool = False) -> None:
    write_line(event.name, {**event.measurements, **event.metadata}, level, asked_for=asked_for)
