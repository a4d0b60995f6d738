"""The service's response to one request, and what it means when it is not a success."""

import contextlib
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import urlsplit

from tinkex_py.errors import InvalidResponse, status_error_class
from tinkex_py.transport.request import NO_SECRET, Secret
from tinkex_py.unicode import with_whole_texts, without_halves

LONGEST_RETRY_AFTER = 60.0
"""Seconds; a service that asks for more is asked again after this long."""

_LONGEST_DETAIL = 300
# Escaped, as bytes that are nearly UTF-8, or in UTF-16, whose brackets and quotes have a zero byte.
_MAY_HOLD_HALVES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")
_SHOULD_RETRY: Mapping[str, bool] = {"true": True, "false": False}
_REQUEST_ID_HEADERS = ("x-request-id", "request-id")


@dataclass(frozen=True, repr=False)
class Response:
    """What came back from one exchange, of any status.

    Attributes:
        status: HTTP status code.
        headers: names in lower case.
        body: decoded (not compressed) body.
        request: method, path and host, for messages.
        secret: the key that was sent, so that messages can leave it out where a service echoes it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    request: str = "the request"
    secret: Secret = field(default=NO_SECRET, compare=False)

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def media_type(self) -> str:
        """Media type of the body in lower case, without parameters; empty if there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def json(self) -> Any:
        """The body, parsed; half characters in it are replaced.

        Raises:
            InvalidResponse: the body is not JSON.
        """
        with contextlib.suppress(ValueError, RecursionError):
            return _parsed(self.body)
        # Raised out here, because json's own error holds the whole body, in which a service may echo the key.
        raise InvalidResponse(
            f"{self.request} returned {self.status} with {len(self.body)} bytes of "
            f"{self.media_type or 'an unnamed type'} that are not JSON. "
            "Is base_url the address of the service itself, and not of a proxy or a login page?"
        )

    def __repr__(self) -> str:
        return f"Response(status={self.status}, media_type={self.media_type!r}, body=<{len(self.body)} bytes>)"


def raise_for_status(response: Response, attempts: int = 1) -> None:
    """Raise the typed error of a response that is not 2xx.

    Args:
        response: the response.
        attempts: how often the request was sent; the error says so.

    Raises:
        APIStatusError: the status is not 2xx; the class fits the status.
    """
    if response.is_success:
        return
    body = _parsed_body(response)
    raise status_error_class(response.status)(
        _message(response, body, attempts),
        status=response.status,
        code=_code(body),
        request_id=_request_id(response, body),
        body=body,
        retry_after=retry_after(response.headers),
        attempts=attempts,
        should_retry=_SHOULD_RETRY.get(response.headers.get("x-should-retry", "").strip().lower()),
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the service asks to wait before the next attempt, at most `LONGEST_RETRY_AFTER`.

    Reads `retry-after-ms`, then `retry-after` as seconds or as an HTTP date. What is not a finite number
    of seconds from now on is ignored.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return min(milliseconds / 1000, LONGEST_RETRY_AFTER)
    told = headers.get("retry-after")
    seconds = _number(told)
    if seconds is None and told is not None:
        seconds = _seconds_until(told)
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


def _parsed(body: bytes) -> Any:
    value: Any = json.loads(body)
    return with_whole_texts(value) if _MAY_HOLD_HALVES.search(body) else value


def _parsed_body(response: Response) -> object:
    try:
        return _redacted(_parsed(response.body), response.secret)
    except (ValueError, RecursionError):
        return response.secret.redacted_from(response.body.decode("utf-8", errors="replace"))


def _redacted(value: Any, secret: Secret) -> Any:
    if isinstance(value, str):
        return secret.redacted_from(value)
    if isinstance(value, list):
        return [_redacted(item, secret) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {
            secret.redacted_from(key): _redacted(item, secret) for key, item in cast("dict[str, Any]", value).items()
        }
    return value


def _message(response: Response, body: object, attempts: int) -> str:
    try:
        phrase = f" {HTTPStatus(response.status).phrase}"
    except ValueError:
        phrase = ""
    times = f" after {attempts} attempts" if attempts > 1 else ""
    detail = " ".join(_detail(body).split())
    if len(detail) > _LONGEST_DETAIL:
        detail = detail[: _LONGEST_DETAIL - 1] + "…"
    parts = [f"{response.request} returned {response.status}{phrase}{times}", detail, _way_out(response)]
    return without_halves(". ".join(part for part in parts if part))


def _way_out(response: Response) -> str:
    if response.status == HTTPStatus.UNAUTHORIZED:
        return "Check the key: TINKER_API_KEY, or api_key of the configuration"
    location = response.headers.get("location")
    if 300 <= response.status < 400 and location:
        where = _origin(location) or "another path of the same host"
        return f"It points to {where}, which is not followed because the key goes along: set base_url to it"
    return ""


def _origin(location: str) -> str | None:
    try:
        parts = urlsplit(location)
    except ValueError:
        return "an invalid address"
    return f"{parts.scheme}://{parts.hostname}" if parts.hostname else None


def _detail(body: object) -> str:
    """What the service says about the error; validation errors without the input they quote."""
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


def _code(body: object) -> str | None:
    return _first_text(body, ("code", "error_code"))


def _request_id(response: Response, body: object) -> str | None:
    told = (response.headers.get(name) for name in _REQUEST_ID_HEADERS)
    header = next(filter(None, told), None)
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
