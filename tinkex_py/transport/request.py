"""One HTTP request before it is sent: checked, complete, and independent of any HTTP library."""

import json as json_module
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.transport.proxies import DEFAULT_PORTS

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

    def with_others(self, others: Iterable[str]) -> "Secret":
        """The same key; `redacted_from` leaves out these texts too."""
        return Secret(self._text, others)

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

    @property
    def name(self) -> str:
        """Method and path for messages and events; the query is left out, it may hold secrets."""
        return f"{self.method} /{self.path.partition('?')[0].lstrip('/')}"

    def body(self) -> bytes | AsyncIterator[bytes] | None:
        """The body as HTTP clients take it; a new one at each call."""
        if self.content is None:
            return None
        return b"".join(self.content) if length_of(self.content) <= _PIECE_BYTES else _pieces(self.content)

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
    sent = {"accept": accept}
    parts = None if content is None else parts_of(content)
    if json is not None:
        parts, content_type = parts_of(encoded_json(json, f"{method} {path.partition('?')[0]}")), JSON
    if parts is not None:
        # The length, because httpx would send a body from a generator in HTTP chunks; some servers refuse those.
        sent |= {"content-type": content_type, "content-length": str(length_of(parts))}
    return Request(method.upper(), path, merged_headers(sent, headers), parts, timeout, follow_redirects)


def join_url(base: SplitResult, path: str) -> str:
    """The path below the base, whose own path is kept."""
    return f"{base.geturl().rstrip('/')}/{path.lstrip('/')}"


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


def length_of(parts: Sequence[memoryview]) -> int:
    """Bytes of a body."""
    return sum(len(part) for part in parts)


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
