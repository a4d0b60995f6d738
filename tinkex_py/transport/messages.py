"""HTTP requests and responses as values, and the typed errors of responses. Independent of any HTTP library."""

import contextlib
import json as json_module
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast
from urllib.parse import SplitResult, urljoin, urlsplit

from tinkex_py.errors import ConfigError, InvalidData, InvalidResponse
from tinkex_py.transport.bodies import FEW_JSON_VALUES, json_excess, too_large
from tinkex_py.transport.proxies import DEFAULT_PORTS
from tinkex_py.unicode import with_whole_texts

# A lone surrogate can be an escape, three bytes of nearly UTF-8, or UTF-16, whose quotes contain a zero byte.
_MAY_HOLD_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")

Bytes = bytes | bytearray | memoryview
Content = Bytes | Sequence[Bytes]
"""A body, or its parts in order."""

JSON = "application/json"
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_PIECE_BYTES = 1 << 20


class Secret:
    """A key that no repr, str, format or pickle shows.

    Args:
        text: the key.
        others: further secrets that `redacted_from` replaces.
    """

    __slots__ = ("_others", "_text")

    def __init__(self, text: str, others: Iterable[str] = ()) -> None:
        self._text = text
        self._others = tuple(others)

    def reveal(self) -> str:
        """Returns the key itself; only for the header that sends it."""
        return self._text

    def with_others(self, others: Sequence[str]) -> "Secret":
        """Returns the same key with further secrets."""
        return Secret(self._text, others) if others else self

    def redacted_from(self, text: str) -> str:
        """Returns the text with every secret replaced."""
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


def may_be_key(text: str) -> bool:
    """Whether a value of a header or a query is long enough to be a key; redacting shorter ones garbles messages."""
    return len(text) >= 8


@dataclass(frozen=True, repr=False)
class Request:
    """One request, without the key and the headers that the client adds. Every attempt sends the same request.

    Attributes:
        method: in upper case.
        path: relative to the service's address; may contain a query.
        headers: names in lower case.
        content: the parts of the body, or None; they must not change before the response.
        timeout: seconds for one exchange; None is the client's timeout.
        follow_redirects: follow redirects within the service's origin that keep the method.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    content: Sequence[memoryview] | None = None
    timeout: float | None = None
    follow_redirects: bool = True

    def body(self) -> bytes | AsyncIterator[bytes] | None:
        """Returns the body in a form that httpx accepts; a new iterator at each call."""
        if self.content is None:
            return None
        is_small = int(self.headers["content-length"]) <= _PIECE_BYTES
        return b"".join(self.content) if is_small else _pieces(self.content)

    def redirected_to(self, status: int, location: str | None, url: str) -> str | None:
        """Returns the URL to which a response redirects this request; None if the redirect must not be followed.

        Redirects are followed only within the origin of `url`, because they carry the key, and never change the method.
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
    """Creates a request and checks it.

    Args:
        method: HTTP method.
        path: see `Request`.
        json: a value to send as JSON instead of `content`.
        content: body, or its parts; not copied.
        content_type: media type of `content`.
        accept: media types of the response.
        headers: further headers, which replace others of the same name.
        timeout: see `Request`.
        follow_redirects: see `Request`.

    Raises:
        InvalidData: a header or the body cannot be sent.
    """
    sent = {"accept": accept, **merged_headers(headers)} if headers else {"accept": accept}
    parts = None if content is None else parts_of(content)
    if json is not None:
        parts, content_type = [memoryview(encoded_json(json, f"{method} {path.partition('?')[0]}"))], JSON
    if parts is None:
        return Request(method.upper(), path, sent, None, timeout, follow_redirects)
    # Without the length, httpx would send a generator's body in HTTP chunks, which some servers refuse.
    described = {"content-type": content_type, "content-length": str(sum(map(len, parts)))}
    return Request(method.upper(), path, {**described, **sent}, parts, timeout, follow_redirects)


def encoded_json(value: object, description: str) -> bytes:
    """Returns a body as compact JSON.

    Raises:
        InvalidData: JSON cannot represent the value; NaN and infinity are examples.
    """
    try:
        return json_module.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidData(f"{description}: the body cannot be sent as JSON ({type(error).__name__})") from None


def merged_headers(*layers: Mapping[str, str]) -> dict[str, str]:
    """Merges headers, with names in lower case; later layers win.

    Raises:
        InvalidData: a name or a value cannot be sent.
    """
    merged = {name.lower(): value for layer in layers for name, value in layer.items()}
    for name, value in merged.items():
        if not (name and name.isascii() and name.isprintable() and " " not in name and ":" not in name):
            raise InvalidData(f"{name!r} is not a valid header name: use ASCII without spaces and colons")
        if not (value.isascii() and value.replace("\t", " ").isprintable()):
            raise InvalidData(f"the value of the header {name!r} cannot be sent: use printable ASCII")
    return merged


def checked_base_url(base_url: str) -> SplitResult:
    """Returns the parts of a service's address.

    Raises:
        ConfigError: it is not an http(s) address, or contains more than scheme, host, port and path.
    """
    way_out = "use an address such as https://host:port/prefix"
    try:
        base = urlsplit(base_url)
        usable = base.scheme in DEFAULT_PORTS and bool(base.hostname) and base.port != 0
    except ValueError:
        raise ConfigError(f"base_url is not a valid address; {way_out}") from None
    if base.username is not None or base.password is not None:
        raise ConfigError("base_url contains a user name or password: remove them, and pass the key as api_key")
    if not usable or not base_url.isascii() or not base_url.isprintable() or " " in base_url:
        shown = f"base_url {base_url!r}" if not set("@?#") & set(base_url) else "base_url"  # which precede secrets
        raise ConfigError(f"{shown} is not an http(s) address with a host; {way_out}")
    if base.query or base.fragment:
        raise ConfigError(f"base_url has a query or fragment after its path {base.path!r}; {way_out}")
    return base


def parts_of(content: Content) -> list[memoryview]:
    """Returns the parts of a body as views of their bytes."""
    parts = [content] if isinstance(content, Bytes) else content
    return [memoryview(part).cast("B") for part in parts]


async def _pieces(parts: Sequence[memoryview]) -> AsyncIterator[bytes]:
    # In pieces, so that a large body neither blocks the event loop nor is copied as a whole.
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
    """The response of one exchange, of any status.

    Attributes:
        status: HTTP status code.
        headers: names in lower case.
        body: decompressed body.
        request: method, path and host, for messages.
        secret: the key that was sent, which messages redact if a service echoes it.
        limit: maximum bytes of a body; the limits of JSON follow from it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    request: str = "the request"
    secret: Secret = field(default=NO_SECRET, compare=False)
    limit: int = field(default=1 << 30, compare=False)

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def media_type(self) -> str:
        """Media type of the body in lower case, without parameters; may be empty."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def json(self) -> Any:
        """Parses the body and replaces lone surrogates, so that all strings can be written anywhere.

        Raises:
            InvalidResponse: the body is not JSON, or would need too much memory.
        """
        if len(self.body) > FEW_JSON_VALUES and (excess := json_excess(self.body, self.limit)):
            raise too_large(f"{self.request} returned {excess}. JSON needs a multiple of its size")
        with contextlib.suppress(ValueError, RecursionError):
            return _parsed(self.body)
        # Raised outside of the block, because json's own error contains the body, in which a service may echo the key.
        raise InvalidResponse(
            f"{self.request} returned {self.status} with {len(self.body)} bytes of "
            f"{self.media_type or 'an unnamed type'} that are not JSON. "
            "Is base_url the address of the service, and not of a proxy or a login page?"
        )

    def readable_body(self) -> object:
        """Returns the parsed JSON, else the text, without the secrets of the request."""
        if len(self.body) > FEW_JSON_VALUES and (excess := json_excess(self.body, self.limit)):
            return f"a body of {excess}"
        try:
            return _redacted(_parsed(self.body), self.secret)
        except (ValueError, RecursionError):
            return self.secret.redacted_from(self.body.decode("utf-8", errors="replace"))

    def __repr__(self) -> str:
        return f"Response(status={self.status}, media_type={self.media_type!r}, body=<{len(self.body)} bytes>)"


def _parsed(body: bytes) -> Any:
    value: Any = json_module.loads(body)
    return with_whole_texts(value) if _MAY_HOLD_SURROGATES.search(body) else value


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
