"""ASGI middleware around the app: errors end here, keys and hosts are checked, and bodies are read within limits."""

import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinkex_py.local.bodies import check_json, check_size, unpacked
from tinkex_py.local.core import Refused
from tinkex_py.local.failures import log_failure
from tinkex_py.local.http import PROTOBUF, AnyTextResponse
from tinkex_py.serving import is_loopback

Headers = Mapping[bytes, bytes]
_WITH_BODY = ("POST", "PUT", "PATCH")
_PROTOBUF = PROTOBUF.encode()
_BODY_HEADERS = (b"content-type", b"content-encoding", b"content-length")


class RequireKey:
    """Lets only requests with the right `X-API-Key` through.

    Args:
        app: the app.
        api_key: the key.
        open_paths: what paths begin with that need no key.
    """

    def __init__(self, app: ASGIApp, api_key: str, open_paths: tuple[str, ...]) -> None:
        self._app = app
        self._key = api_key.encode()
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or pass on."""
        is_open = scope["type"] != "http" or scope["path"].startswith(self._open_paths)
        # In constant time: the time must not depend on how much of the key is right.
        if is_open or hmac.compare_digest(_headers(scope).get(b"x-api-key", b""), self._key):
            await self._app(scope, receive, send)
        else:
            await _refuse(401, "the X-API-Key header is missing or wrong", scope, receive, send)


class LoopbackOnly:
    """Refuses what a web page could make its reader's browser send to a service without a key.

    Such a request names another host: in `Host`, where the page has made its own name lead here, else in `Origin`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 or pass on."""
        if scope["type"] == "http":
            headers = _headers(scope)
            host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
            if not is_loopback(_hostname(f"//{host}")) or (origin and not is_loopback(_hostname(origin))):
                detail = "this service has no key, so it answers only requests that name this machine: set an api_key"
                await _refuse(403, detail, scope, receive, send)
                return
        await self._app(scope, receive, send)


class ErrorBoundary:
    """The outermost layer: no error leaves the app, because a server would log its text, which may quote a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; an error is logged without its text, and answered 500 if nothing was answered yet."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        # The layers below change this copy, and the app puts its endpoint there.
        scope = dict(scope)
        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  (whatever it was, it ends here)
            log_failure(_asked(scope), error)
            if not answered:
                await _refuse(500, type(error).__name__, scope, receive, send)


class ReadBody:
    """Reads a body before the app does, within limits of its bytes, sent and unpacked, and of the structure of JSON.

    The app gets it plain and whole. What does not say that it is protobuf is JSON, whatever else it says it is; an
    empty body is an empty object.

    Args:
        app: the app.
        max_bytes: how large a body may be, also unpacked.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 400, 413 or 415, or pass on."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        is_protobuf = headers.get(b"content-type", b"").startswith(_PROTOBUF)
        try:
            body = await self._plain(headers, receive)
            if not is_protobuf:
                body = body or b"{}"
                check_json(body)
        except Refused as refused:
            await _refuse(refused.status, refused.detail, scope, receive, send)
            return
        kept = [(name, value) for name, value in scope["headers"] if name not in _BODY_HEADERS]
        # The app reads a body without a type as JSON.
        types = [(b"content-type", _PROTOBUF)] if is_protobuf else []
        scope["headers"] = [*kept, *types, (b"content-length", str(len(body)).encode())]
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, read, send)

    async def _plain(self, headers: Headers, receive: Receive) -> bytes:
        body = await self._received(headers.get(b"content-length", b""), receive)
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").lower()
        if encoding == "zstd":
            return unpacked(body, self._max_bytes)
        if encoding not in ("identity", ""):
            raise Refused(415, f"Content-Encoding {encoding!r} is not understood; send the body plain or with zstd")
        return body

    async def _received(self, announced: bytes, receive: Receive) -> bytes:
        if announced.isdigit():
            check_size(int(announced[:20]), self._max_bytes)
        # The header may be wrong or missing: the bytes are counted.
        pieces: list[bytes] = []
        received = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece: bytes = message.get("body", b"")
            received += len(piece)
            check_size(received, self._max_bytes)
            pieces.append(piece)
            more = message.get("more_body", False)
        return b"".join(pieces)


def _headers(scope: Scope) -> Headers:
    """The headers by name, in lower case as ASGI has them; of several the first counts."""
    return dict(reversed(scope["headers"]))


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _asked(scope: Scope) -> str:
    """What was asked for, without the names in the path."""
    return getattr(scope.get("endpoint"), "__name__", "a request")


async def _refuse(status: int, detail: str, scope: Scope, receive: Receive, send: Send) -> None:
    await AnyTextResponse({"detail": detail}, status_code=status)(scope, receive, send)
