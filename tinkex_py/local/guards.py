"""ASGI layers around the app: who may ask, what all answers have, and where errors end."""

import hmac
import itertools
import secrets
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinkex_py.local.failures import log_failure
from tinkex_py.local.http import AnyTextResponse
from tinkex_py.serving import is_loopback


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
        # In the same time whatever the key is: the time must not tell how much of it is right.
        if is_open or hmac.compare_digest(_header(scope, b"x-api-key"), self._key):
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
            host, origin = (_header(scope, name).decode("latin-1") for name in (b"host", b"origin"))
            if not is_loopback(_hostname(f"//{host}")) or (origin and not is_loopback(_hostname(origin))):
                detail = "this service has no key, so it answers only requests that name this machine: set an api_key"
                await _refuse(403, detail, scope, receive, send)
                return
        await self._app(scope, receive, send)


class Contained:
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

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  (whatever it was, it ends here)
            log_failure(_asked(scope), error)
            if not answered:
                await _refuse(500, type(error).__name__, scope, receive, send)


class Numbered:
    """Gives every answer an `x-request-id` of its own: for logs, and so that no two answers are the same."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._run = secrets.token_hex(4)
        self._count = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number = f"{self._run}-{next(self._count)}".encode()

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number)]}
            await send(message)

        await self._app(scope, receive, numbered)


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name.lower() == wanted), b"")


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
