"""One HTTP request before it is sent: checked, complete, and independent of any HTTP library."""

import json as json_module
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import SplitResult, urljoin, urlsplit

from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.transport.answer import Secret
from tinkex_py.version import __version__

USER_AGENT = f"tinkex-py/{__version__}"

Bytes = bytes | bytearray | memoryview
Content = Bytes | Sequence[Bytes]
"""A body, or its parts in order."""

_PIECE_BYTES = 1 << 20
_DEFAULT_PORTS = {"http": 80, "https": 443}


class SecretText(Protocol):
    """A key in a wrapper, such as pydantic's SecretStr."""

    def get_secret_value(self) -> str:
        """The key itself."""
        ...


@dataclass(frozen=True, repr=False)
class HttpRequest:
    """One request, ready to be sent.

    Attributes:
        method: in upper case.
        url: absolute, with its query.
        headers: names in lower case; the key is among them.
        content: the parts of the body, or None.
        timeout: seconds for the whole exchange.
        description: method, path and host, for messages.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    content: Sequence[memoryview] | None
    timeout: float
    description: str

    def body(self) -> bytes | AsyncIterator[bytes] | None:
        """The body as HTTP clients take it; a new one at each call."""
        if self.content is None:
            return None
        return b"".join(self.content) if length_of(self.content) <= _PIECE_BYTES else _pieces(self.content)

    def redirected_to(self, status: int, location: str | None, url: str) -> str | None:
        """Where to send this request again, or None if the answer is to be taken as it is.

        Only within the origin of `url`, because the key goes along, and never with another method.
        """
        keeps_method = status in (307, 308) or (status in (301, 302, 303) and self.method in ("GET", "HEAD"))
        if not location or not keeps_method:
            return None
        try:
            target = urljoin(url, location)
            return target if _origin(target) == _origin(url) else None
        except ValueError:
            return None


def describe(method: str, path: str, host: str) -> str:
    """Method, path and host for messages; the query is left out, it may hold secrets."""
    return f"{method} /{path.partition('?')[0].lstrip('/')} at {host}"


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
        usable = base.scheme in _DEFAULT_PORTS and bool(base.hostname) and base.port != 0
    except ValueError:
        raise ConfigError(f"base_url cannot be understood as an address; {way_out}") from None
    if base.username is not None or base.password is not None:
        raise ConfigError("base_url holds a user name or password; leave them out and give the key as api_key")
    if not usable or not base_url.isascii() or not base_url.isprintable() or " " in base_url:
        raise ConfigError(f"base_url {base_url!r} is not an http(s) address with a host; {way_out}")
    if base.query or base.fragment:
        raise ConfigError(f"base_url has a query or fragment behind its path {base.path!r}; {way_out}")
    return base


def checked_key(api_key: str | SecretText | None) -> Secret:
    """The key, wrapped so that it does not show.

    Raises:
        ConfigError: it has characters that no header can hold.
    """
    if api_key is None:
        return Secret("")
    text = api_key if isinstance(api_key, str) else api_key.get_secret_value()
    if not text.isascii() or not text.isprintable() or text != text.strip():
        raise ConfigError("api_key has spaces around it or characters that cannot be sent; was it copied completely?")
    return Secret(text)


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
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)
