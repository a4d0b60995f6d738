"""Transports over something that exists already: a user's HTTP client, or a service in this process."""

import asyncio
import contextvars
from typing import Any

import httpx

from tinkex_py.errors import ConfigError, ConnectionFailed


class ClientTransport(httpx.AsyncBaseTransport):
    """Sends through a client with the interface of `httpx.AsyncClient`, which the user closes.

    Args:
        client: the client. (httpx up to 0.28 loses connections of cancelled requests; httpx2 does not.)
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request, with the client's own headers beside those of the request."""
        timeouts = request.extensions["timeout"]
        built = self._client.build_request(
            request.method,
            str(request.url),
            headers=dict(request.headers),
            content=request.content if isinstance(request.stream, httpx.ByteStream) else request.stream,
            # In this order: any client with httpx's interface accepts it.
            timeout=tuple(timeouts[name] for name in ("connect", "read", "write", "pool")),
        )
        return await self._client.send(built, follow_redirects=False, stream=True)


class InProcessTransport(httpx.AsyncBaseTransport):
    """Calls an ASGI app as if it were another process: the caller's contextvars do not reach it.

    Args:
        app: the app.
    """

    def __init__(self, app: Any) -> None:
        self._transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Returns the app's whole response.

        Raises:
            ConnectionFailed: the app failed in the middle of its response, which ASGITransport truncates silently.
            AssertionError: the app ended without a response.
        """
        response = await _in_fresh_context(self._transport, request)
        body = b"".join([piece async for piece in response.aiter_raw()])
        announced = response.headers.get("content-length")
        if request.method != "HEAD" and announced is not None and announced != str(len(body)):
            raise ConnectionFailed(f"the response of the service in this process has {len(body)} of {announced} bytes")
        return httpx.Response(response.status_code, headers=response.headers, stream=httpx.ByteStream(body))


async def _in_fresh_context(transport: httpx.ASGITransport, request: httpx.Request) -> httpx.Response:
    async def outcome() -> httpx.Response | Exception:
        try:
            return await transport.handle_async_request(request)
        except Exception as error:  # noqa: BLE001  (raised below, outside of the task group, which would wrap it)
            return error

    async with asyncio.TaskGroup() as group:
        task = group.create_task(outcome(), context=contextvars.Context(), name="tinkex.http.in_process")
    result = task.result()
    if isinstance(result, Exception):
        raise result
    return result


def client_transport(http_client: object | None) -> ClientTransport | None:
    """Returns the transport of a given client; raises ConfigError if it does not have httpx's interface."""
    if http_client is None:
        return None
    for needed in ("build_request", "send"):
        if not callable(getattr(http_client, needed, None)):
            raise ConfigError(f"http_client has no {needed}(): pass a client with httpx's interface, or omit it")
    return ClientTransport(http_client)
