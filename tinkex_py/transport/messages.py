"""HTTP messages: a request before it is sent, and what a response means. Independent of any HTTP library."""

import contextlib
import json as json_module
import math
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, cast
from urllib.parse import SplitResult, urljoin, urlsplit

from tinkex_py.errors import ConfigError, InvalidData, InvalidResponse, status_error_class
from tinkex_py.transport.proxies import DEFAULT_PORTS
from tinkex_py.unicode import with_whole_texts, without_halves

LONGEST_RETRY_AFTER = 60.0
"""Seconds; a service that asks for more is asked again after this long."""

_LONGEST_DETAIL = 300
# Escaped, as bytes that are nearly UTF-8, or in UTF-16, whose brackets and quotes have a zero byte.
_MAY_HOLD_HALVES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")
_SHOULD_RETRY: Mapping[str, bool] = {"true": True, "false": False}
_REQUEST_ID_HEADERS = ("x-request-id", "request-id")


Bytes = bytes | bytearray | memoryview
Content = Bytes | Sequence[Bytes]
"""A body, or its parts in order."""

JSON = "application/json"
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_PIECE_BYTES = 1 << 20


class Secret:
    """A key that shows in no repr, str, format or pickle.

    Args:
        text: the key.
        others: more texts that are kept out wherever the key is.
    """

    __slots__ = ("_others", "_text")

    def __init__(self, text: str, others: Iterable[str] = ()) -> None:
        self._text = text
        self._others = tuple(others)

    def reveal(self) -> str:
        """The key itself; only for the header it is sent in."""
        return self._text

    def with_others(self, others: Sequence[str]) -> "Secret":
        """The same key; `redacted_from` leaves out these texts too."""
        return Secret(self._text, others) if others else self

    def redacted_from(self, text: str) -> str:
        """The text without the key."""
        for secret in (self._text, *self._others):
            text = text.replace(secret, "[redacted]") if secret else text
        return text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Secret('**********')"

    def __reduce__(self) -> tuple[Any, ...]:
        return Secret, ("",)


NO_SECRET = Secret("")


@dataclass(frozen=True, repr=False)
class Request:
    """One request, without the key and the headers that the client adds. Every attempt sends the same.

    Attributes:
        method: in upper case.
        path: below the service's address, with its query if it has one.
        headers: names in lower case.
        content: the parts of the body, or None; they must not change while the request is under way.
        timeout: seconds for one exchange; None is the client's.
        follow_redirects: within the origin of the service, where the method stays.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    content: Sequence[memoryview] | None = None
    timeout: float | None = None
    follow_redirects: bool = True

    def body(self) -> bytes | AsyncIterator[bytes] | None:
        """The body as HTTP clients take it; a new one at each call."""
        if self.content is None:
            return None
        is_small = int(self.headers["content-length"]) <= _PIECE_BYTES
        return b"".join(self.content) if is_small else _pieces(self.content)

    def redirected_to(self, status: int, location: str | None, url: str) -> str | None:
        """Where to send this request again, or None if the response is to be taken as it is.

        Only within the origin of `url`, because the key goes along, and never with another method.
        """
        keeps_method = status in (307, 308) or (status in (301, 302, 303) and self.method in ("GET", "HEAD"))
        if not location or not keeps_method or not self.follow_redirects:
            return None
        try:
            target = urljoin(url, location)
            return target if same_origin(target, url) else None
        except ValueError:
            return None


def request(
    method: str,
    path: str,
    *,
    json: object | None = None,
    content: Content | None = None,
    content_type: str = "application/octet-stream",
    accept: str = JSON,
    headers: Mapping[str, str] = NO_HEADERS,
    timeout: float | None = None,
    follow_redirects: bool = True,
) -> Request:
    """A request, checked.

    Args:
        method: HTTP method.
        path: below the service's address, with its query if it has one.
        json: a value to send as JSON instead of `content`.
        content: body, or its parts; not copied.
        content_type: media type of `content`.
        accept: media types of the response.
        headers: more headers; they win.
        timeout: seconds for one exchange; None is the client's.
        follow_redirects: within the origin of the service, where the method stays.

    Raises:
        InvalidData: a header or the body cannot be sent.
    """
    sent = {"accept": accept, **merged_headers(headers)} if headers else {"accept": accept}
    parts = None if content is None else parts_of(content)
    if json is not None:
        parts, content_type = [memoryview(encoded_json(json, f"{method} {path.partition('?')[0]}"))], JSON
    if parts is None:
        return Request(method.upper(), path, sent, None, timeout, follow_redirects)
    # The length, because httpx would send a body from a generator in HTTP chunks; some servers refuse those.
    described = {"content-type": content_type, "content-length": str(sum(map(len, parts)))}
    return Request(method.upper(), path, {**described, **sent}, parts, timeout, follow_redirects)


def encoded_json(value: object, description: str) -> bytes:
    """A body as compact JSON.

    Raises:
        InvalidData: the value has no JSON form (NaN and infinity have none either).
    """
    try:
        return json_module.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidData(f"{description}: the body cannot be sent as JSON ({type(error).__name__})") from None


def merged_headers(*layers: Mapping[str, str]) -> dict[str, str]:
    """All headers with names in lower case; later layers win.

    Raises:
        InvalidData: a name or a value cannot be sent.
    """
    merged = {name.lower(): value for layer in layers for name, value in layer.items()}
    for name, value in merged.items():
        if not (name and name.isascii() and name.isprintable() and " " not in name and ":" not in name):
            raise InvalidData(f"{name!r} cannot be the name of a header")
        if not (value.isascii() and value.replace("\t", " ").isprintable()):
            raise InvalidData(f"the value of the header {name!r} has characters that cannot be sent")
    return merged


def checked_base_url(base_url: str) -> SplitResult:
    """The parts of an address that a service can have.

    Raises:
        ConfigError: it is no http(s) address, or holds more than scheme, host, port and path.
    """
    way_out = "give something like https://host:port/prefix"
    try:
        base = urlsplit(base_url)
        usable = base.scheme in DEFAULT_PORTS and bool(base.hostname) and base.port != 0
    except ValueError:
        raise ConfigError(f"base_url cannot be understood as an address; {way_out}") from None
    if base.username is not None or base.password is not None:
        raise ConfigError("base_url holds a user name or password; leave them out and give the key as api_key")
    if not usable or not base_url.isascii() or not base_url.isprintable() or " " in base_url:
        raise ConfigError(f"base_url {base_url!r} is not an http(s) address with a host; {way_out}")
    if base.query or base.fragment:
        raise ConfigError(f"base_url has a query or fragment behind its path {base.path!r}; {way_out}")
    return base


def parts_of(content: Content) -> list[memoryview]:
    """The parts of a body, as bytes and without a copy."""
    parts = [content] if isinstance(content, Bytes) else content
    return [memoryview(part).cast("B") for part in parts]


async def _pieces(parts: Sequence[memoryview]) -> AsyncIterator[bytes]:
    # Piece by piece, so that a large body neither stalls the event loop nor is held twice.
    for part in parts:
        for start in range(0, len(part), _PIECE_BYTES):
            yield bytes(part[start : start + _PIECE_BYTES])


def same_origin(one: str, other: str) -> bool:
    """Whether two addresses have the same scheme, host and port."""
    return _origin(one) == _origin(other)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or DEFAULT_PORTS.get(parts.scheme)


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
    value: Any = json_module.loads(body)
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
        where = _place_of(location) or "another path of the same host"
        return f"It points to {where}, which is not followed because the key goes along: set base_url to it"
    return ""


def _place_of(location: str) -> str | None:
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
