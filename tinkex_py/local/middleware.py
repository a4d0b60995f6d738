"""ASGI middleware around the app: contains errors, checks keys and hosts, and reads bodies within limits.

FastAPI reads a declared body before any dependency runs, so that limits cannot be dependencies.
"""

import hmac
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinkex_py.local.bodies import MAX_JSON_BYTES, SMALL_BODY, check_size, decompressed, parse_json
from tinkex_py.local.core import Refused, Startable, log_failure
from tinkex_py.local.http import JSON_VALUE, PROTOBUF, UnicodeJSONResponse
from tinkex_py.serving import is_loopback

T = TypeVar("T")
_WITH_BODY = ("POST", "PUT", "PATCH")
_PROTOBUF = PROTOBUF.encode()
_BODY_HEADERS = (b"content-type", b"content-encoding", b"content-length")


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
    """Reads a body within limits of its size, also decompressed, and of its JSON.

    The app receives it whole and decompressed. A body that is not declared as protobuf is JSON, which `scope` contains
    decoded; an empty body is an empty object.

    Args:
        app: the app.
        service: the service, whose threads read large bodies.
    """

    def __init__(self, app: ASGIApp, service: Startable) -> None:
        self._app = app
        self._service = service
        self._max_bytes = service.options.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns 400, 413 or 415, or passes on."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        is_protobuf = headers.get(b"content-type", b"").startswith(_PROTOBUF)
        try:
            body = await self._read(headers, receive, is_protobuf=is_protobuf)
            if not is_protobuf:
                body = body or b"{}"
                scope[JSON_VALUE] = await self._aside(lambda: parse_json(body), len(body))
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

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive, *, is_protobuf: bool) -> bytes:
        limit = self._max_bytes if is_protobuf else min(self._max_bytes, MAX_JSON_BYTES)
        pieces = await self._received(headers.get(b"content-length", b""), receive, limit)
        body = await self._aside(lambda: b"".join(pieces), sum(map(len, pieces)))
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").lower()
        if encoding == "zstd":
            # A small stream may grow large.
            return await self._aside(lambda: decompressed(body, limit), limit)
        if encoding not in ("identity", ""):
            raise Refused(415, f"Content-Encoding {encoding!r} is not supported; send the body plain or with zstd")
        return body

    async def _aside(self, work: Callable[[], T], size: int) -> T:
        core = self._service.core
        return work() if core is None or size <= SMALL_BODY else await core.aside(work)

    async def _received(self, announced: bytes, receive: Receive, limit: int) -> list[bytes]:
        if announced.isdigit():
            check_size(int(announced[:20]), limit)
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
            check_size(received, limit)
            pieces.append(piece)
            more = message.get("more_body", False)
        return pieces


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
