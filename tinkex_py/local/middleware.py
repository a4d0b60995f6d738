"""ASGI middleware around the app: contains errors, checks keys and hosts, and reads bodies within limits.

FastAPI reads a declared body before any dependency runs, so that limits cannot be dependencies.
"""

import hmac
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinkex_py.local.core import Refused, log_failure
from tinkex_py.local.http import PROTOBUF, UnicodeJSONResponse
from tinkex_py.serving import is_loopback

MAX_JSON_DEPTH = 64
"""Nesting of lists and objects; the bodies of the protocol have fewer than 12 levels."""
MAX_JSON_PARTS = 5_000_000
"""Lists, objects and texts of one body: a few bytes of JSON become up to a hundred in memory."""
_WITH_BODY = ("POST", "PUT", "PATCH")
_PROTOBUF = PROTOBUF.encode()
_BODY_HEADERS = (b"content-type", b"content-encoding", b"content-length")
# A zstd stream can grow by at most 128 KiB for each byte of a step.
_ZSTD_STEP = 1024
_TEXT = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NO_BRACKETS = re.compile(r"[^][{}]++")


class RequireKey:
    """Requires the right `X-API-Key`.

    Args:
        app: the app.
        api_key: the key.
        open_paths: beginnings of paths that need no key.
    """

    def __init__(self, app: ASGIApp, api_key: str, open_paths: tuple[str, ...]) -> None:
        self._app = app
        self._key = api_key.encode()
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns 401 or passes on."""
        is_open = scope["type"] != "http" or scope["path"].startswith(self._open_paths)
        # Constant time: the duration must not depend on how much of the key is right.
        if is_open or hmac.compare_digest(_headers(scope).get(b"x-api-key", b""), self._key):
            await self._app(scope, receive, send)
        else:
            await _refuse(Refused(401, "the X-API-Key header is missing or wrong"), scope, receive, send)


class LoopbackOnly:
    """Refuses requests that a web page could send through its reader's browser to a service without a key.

    Such a request names another host: in `Host` if the page's own name resolves to this machine, else in `Origin`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns 403 or passes on."""
        if scope["type"] == "http":
            headers = _headers(scope)
            host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
            if not is_loopback(_hostname(f"//{host}")) or (origin and not is_loopback(_hostname(origin))):
                detail = "a service without a key accepts only requests that name this machine: set an api_key"
                await _refuse(Refused(403, detail), scope, receive, send)
                return
        await self._app(scope, receive, send)


class ErrorBoundary:
    """The outermost layer: logs errors without their text, which may quote a body, and returns 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, and contains errors."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        # The inner layers change this copy, and the app adds its endpoint.
        scope = dict(scope)
        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  (the boundary contains every error)
            # The name of the endpoint instead of the path, which contains names.
            log_failure(getattr(scope.get("endpoint"), "__name__", "a request"), error)
            if not started:
                await _refuse(Refused(500, type(error).__name__), scope, receive, send)


class ReadBody:
    """Reads a body within limits of its size, also decompressed, and of its JSON structure.

    The app receives it whole and decompressed. A body that is not declared as protobuf is JSON; an empty body is an
    empty object.

    Args:
        app: the app.
        max_bytes: maximum size of a body, also decompressed.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns 400, 413 or 415, or passes on."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        is_protobuf = headers.get(b"content-type", b"").startswith(_PROTOBUF)
        try:
            body = await self._read(headers, receive)
            if not is_protobuf:
                body = body or b"{}"
                _check_json(body)
        except Refused as refused:
            await _refuse(refused, scope, receive, send)
            return
        kept = [(name, value) for name, value in scope["headers"] if name not in _BODY_HEADERS]
        types = [(b"content-type", _PROTOBUF)] if is_protobuf else []
        scope["headers"] = [*kept, *types, (b"content-length", str(len(body)).encode())]
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, read, send)

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        body = await self._received(headers.get(b"content-length", b""), receive)
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").lower()
        if encoding == "zstd":
            return decompressed(body, self._max_bytes)
        if encoding not in ("identity", ""):
            raise Refused(415, f"Content-Encoding {encoding!r} is not supported; send the body plain or with zstd")
        return body

    async def _received(self, announced: bytes, receive: Receive) -> bytes:
        if announced.isdigit():
            _check_size(int(announced[:20]), self._max_bytes)
        # The header may be wrong or missing.
        pieces: list[bytes] = []
        received = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece: bytes = message.get("body", b"")
            received += len(piece)
            _check_size(received, self._max_bytes)
            pieces.append(piece)
            more = message.get("more_body", False)
        return b"".join(pieces)


def decompressed(body: bytes, limit: int) -> bytes:
    """Returns the content of one whole zstd stream.

    Raises:
        Refused: 413, more than `limit` bytes; 400, not one whole stream; 415, zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise Refused(415, "zstd is not installed here: send the body plain, or pip install zstandard") from None
    stream = zstandard.ZstdDecompressor().decompressobj()
    pieces: list[bytes] = []
    size = taken = 0
    try:
        while taken < len(body) and not stream.eof:
            piece = stream.decompress(body[taken : taken + _ZSTD_STEP])
            taken += _ZSTD_STEP
            size += len(piece)
            _check_size(size, limit)
            pieces.append(piece)
    except zstandard.ZstdError:
        raise Refused(400, "the body is not a valid zstd stream") from None
    if not stream.eof or stream.unused_data or taken < len(body):
        raise Refused(400, "the body is not a valid zstd stream: it is truncated, or followed by other bytes")
    return b"".join(pieces)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise Refused(413, f"the body is larger than {limit} bytes")


def _check_json(body: bytes) -> None:
    # With a NUL among the first bytes, the decoder would read UTF-16, in which brackets are other bytes.
    if b"\0" in body:
        raise Refused(400, "the body is not valid JSON: it contains a NUL byte")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(400, "the body is not valid JSON: it is not UTF-8") from None
    check_structure(text)


def check_structure(text: str) -> None:
    """Refuses JSON that would cost its decoder, or its readers, more than its length implies.

    Raises:
        Refused: 413, too many parts; 400, nested too deeply.
    """
    containers = text.count("[") + text.count("{")
    if containers + text.count('"') // 2 > MAX_JSON_PARTS:
        raise Refused(413, f"the body has more than {MAX_JSON_PARTS} lists, objects and texts")
    if containers <= MAX_JSON_DEPTH:
        return
    brackets = _NO_BRACKETS.sub("", _TEXT.sub("", text)).replace("{", "[").replace("}", "]")
    # Each round removes the innermost level. Unpaired brackets stay, for the decoder to report.
    levels = 0
    while levels <= MAX_JSON_DEPTH and (outer := brackets.replace("[]", "")) != brackets:
        brackets = outer
        levels += 1
    if levels + brackets.count("[") > MAX_JSON_DEPTH:
        raise Refused(400, f"the body is nested too deeply: at most {MAX_JSON_DEPTH} lists and objects")


def _headers(scope: Scope) -> Mapping[bytes, bytes]:
    """Headers by lower-case name; of repeated headers the first counts."""
    return dict(reversed(scope["headers"]))


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


async def _refuse(refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    await UnicodeJSONResponse({"detail": refused.detail}, status_code=refused.status)(scope, receive, send)
