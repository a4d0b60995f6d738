"""The typed errors of responses that are not 2xx, and of failures of an HTTP library."""

import math
import re
import socket
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import cast
from urllib.parse import urlsplit

from tinkex_py.errors import (
    APIStatusError,
    ConnectionFailed,
    InvalidData,
    InvalidResponse,
    MissingEndpoint,
    TimeoutExceeded,
    TinkexError,
    TransportError,
    status_error_class,
)
from tinkex_py.transport.bodies import BodyTooLarge, too_large
from tinkex_py.transport.connections import HandshakeFailed
from tinkex_py.transport.messages import Response
from tinkex_py.transport.proxies import ProxyAddress

LONGEST_RETRY_AFTER = 60.0
"""Seconds; longer waits that a service asks for are cut to this."""

_LONGEST_DETAIL = 300
_SHOULD_RETRY: Mapping[str, bool] = {"true": True, "false": False}
_REQUEST_ID_HEADERS = ("x-request-id", "request-id")
# Routers say that there is no such path in these words; an endpoint names what it did not find. The embedded service
# says "GET /path: Not Found".
_ROUTER_WORDS = re.compile(r"(404 )?(page )?(not found)?|[a-z]+ /\S*: not found", re.IGNORECASE)

_BROKEN_CONNECTION = frozenset({"TransportError", "NetworkError", "ProtocolError", "OSError"})
_TIMEOUTS = frozenset({"TimeoutException", "TimeoutError"})
_CANNOT_BE_SENT = frozenset({"InvalidURL", "LocalProtocolError"})
# httpx has one class for a response that broke off and one that is not HTTP: only the text differs.
_TEXTS_OF_A_BROKEN_CONNECTION = ("disconnected", "peer closed", "peer unexpectedly closed")


def typed_failure(
    error: BaseException, request: str, seconds: float, proxy: ProxyAddress | None
) -> TransportError | InvalidData | None:
    """Returns the typed error for a failure of an HTTP library; None for any other failure.

    The failure does not become the cause: it may hold the request, whose headers contain the key. Classes are compared
    by name, because the user's client may belong to httpx2, which has its own classes.

    Args:
        error: the failure.
        request: method, path and host, for messages.
        seconds: the time limit of the exchange.
        proxy: the proxy of the connection.
    """
    if isinstance(error, TinkexError):
        return None
    failure = _typed(error, request, seconds, proxy)
    if proxy is None or failure is None or str(proxy) in str(failure) or isinstance(failure, InvalidData):
        return failure
    failure.args = (f"{failure}. The connection leads through {proxy}",)
    return failure


def _typed(
    error: BaseException, request: str, seconds: float, proxy: ProxyAddress | None
) -> TransportError | InvalidData | None:
    names = {cls.__name__ for cls in type(error).__mro__}
    failed = f"{request}: {type(error).__name__}"
    if "ConnectTimeout" in names and proxy is not None:
        return TimeoutExceeded(f"{failed}; {_no_connection_to(proxy)}")
    if names & _TIMEOUTS:
        return TimeoutExceeded(f"{failed}; the service did not respond within {seconds:g} s")
    if isinstance(error, BodyTooLarge):
        return too_large(f"{request}: the response has more than its limit of {error.limit} bytes after decompression")
    if "DecodingError" in names:
        return InvalidResponse(f"{failed}; the response could not be decompressed: {error}")
    if "RemoteProtocolError" in names and not any(text in str(error) for text in _TEXTS_OF_A_BROKEN_CONNECTION):
        return InvalidResponse(f"{failed}; the response is not HTTP. Is base_url the address of the service?")
    if "ProxyError" in names and proxy is not None:
        return ConnectionFailed(f"{failed}; {proxy} refused: {error}")
    if "ConnectError" in names:
        return ConnectionFailed(f"{failed}; {_why_no_connection(error, proxy)}")
    if names & _CANNOT_BE_SENT:
        return InvalidData(f"{failed}; the path or a header cannot be sent")
    if names & _BROKEN_CONNECTION:
        return ConnectionFailed(f"{failed}; the connection broke before the response was complete")
    if "AssertionError" in names:
        return InvalidResponse(f"{failed}; the service in this process ended without a response")
    return None


def _why_no_connection(failure: BaseException | None, proxy: ProxyAddress | None) -> str:
    error, handshake = failure, ""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"the certificate of the service is not trusted: {error.verify_message}. If it is your own, set "
                "SSL_CERT_FILE to its file"
            )
        if isinstance(error, HandshakeFailed | ssl.SSLError):
            reason = error.reason if isinstance(error, ssl.SSLError) else str(error) or "the peer closed the connection"
            handshake = f"the TLS handshake failed ({reason}). Does the service use https there?"
        if isinstance(error, socket.gaierror) and proxy is None:
            return f"the host name cannot be resolved ({error.strerror}). Is base_url right?"
        error = error.__cause__ or error.__context__
    if handshake:
        return handshake
    if proxy is not None:
        return _no_connection_to(proxy)
    return "nothing answers there. Is the service running, and base_url right?"


def _no_connection_to(proxy: ProxyAddress) -> str:
    return f"no connection to {proxy}. Is it running? The service needs none if NO_PROXY names its host"


def status_error(response: Response, attempts: int = 1) -> APIStatusError:
    """Returns the typed error of a response that is not 2xx; each status has its class.

    Args:
        response: the response.
        attempts: how often the request was sent, for the error.
    """
    body = response.readable_body()
    kind = _class_of(response.status, body)
    return kind(
        _message(response, body, attempts, _way_out(kind, response)),
        status=response.status,
        code=_first_text(body, ("code", "error_code")),
        request_id=_request_id(response, body),
        body=body,
        retry_after=retry_after(response.headers),
        attempts=attempts,
        should_retry=_SHOULD_RETRY.get(response.headers.get("x-should-retry", "").strip().lower()),
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that the service asks to wait, at most `LONGEST_RETRY_AFTER`; None if it does not ask.

    Reads `retry-after-ms`, then `retry-after` as seconds or as an HTTP date. Negative and non-finite values are
    ignored.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return min(milliseconds / 1000, LONGEST_RETRY_AFTER)
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is None and value is not None:
        seconds = _seconds_until(value)
    return None if seconds is None else min(seconds, LONGEST_RETRY_AFTER)


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _seconds_until(http_date: str) -> float | None:
    try:
        seconds = parsedate_to_datetime(http_date).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return seconds if seconds >= 0 else None


def _class_of(status: int, body: object) -> type[APIStatusError]:
    detail = cast("dict[str, object]", body).get("detail") if isinstance(body, dict) else body
    is_of_router = isinstance(detail, str) and _ROUTER_WORDS.fullmatch(detail.strip()) is not None
    return MissingEndpoint if status == HTTPStatus.NOT_FOUND and is_of_router else status_error_class(status)


def _message(response: Response, body: object, attempts: int, way_out: str) -> str:
    try:
        phrase = f" {HTTPStatus(response.status).phrase}"
    except ValueError:
        phrase = ""
    times = f" after {attempts} attempts" if attempts > 1 else ""
    detail = " ".join(_detail(body).split())
    if len(detail) > _LONGEST_DETAIL:
        detail = detail[: _LONGEST_DETAIL - 1] + "…"
    parts = [f"{response.request} returned {response.status}{phrase}{times}", detail, way_out]
    return ". ".join(part for part in parts if part)


def _way_out(kind: type[APIStatusError], response: Response) -> str:
    if kind is MissingEndpoint:
        return "The service does not have this endpoint: use another way, or check base_url"
    if response.status == HTTPStatus.UNAUTHORIZED:
        return "Check the key: TINKER_API_KEY, or api_key of the configuration"
    location = response.headers.get("location")
    if 300 <= response.status < 400 and location:
        try:
            parts = urlsplit(location)
            target = f"{parts.scheme}://{parts.hostname}" if parts.hostname else "another path of the same host"
        except ValueError:
            target = "an invalid address"
        return f"The redirect to {target} was not followed, because it would carry the key: set base_url to its target"
    return ""


def _detail(body: object) -> str:
    """Returns the service's explanation; validation errors without the input that they quote."""
    if isinstance(body, str):
        return body
    if isinstance(body, list):
        return "; ".join(filter(None, (_detail(item) for item in cast("list[object]", body))))
    if not isinstance(body, dict):
        return ""
    fields = cast("dict[str, object]", body)
    if isinstance(fields.get("msg"), str):
        location = fields.get("loc")
        parts = cast("list[object]", location) if isinstance(location, list) else []
        return ": ".join(filter(None, [".".join(map(str, parts)), str(fields["msg"])]))
    for name in ("detail", "error", "message", "title"):
        if text := _detail(fields.get(name)):
            return text
    return ""


def _request_id(response: Response, body: object) -> str | None:
    header = next(filter(None, map(response.headers.get, _REQUEST_ID_HEADERS)), None)
    return response.secret.redacted_from(header) if header else _first_text(body, ("request_id",))


def _first_text(body: object, names: tuple[str, ...]) -> str | None:
    if not isinstance(body, dict):
        return None
    fields = cast("dict[str, object]", body)
    for name in names:
        value = fields.get(name)
        if isinstance(value, str | int):
            return str(value)
    return _first_text(fields.get("error"), names) or _first_text(fields.get("detail"), names)
