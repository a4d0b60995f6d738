"""One connection to the service: what is sent over it, and whether it may be used again.

Only this file imports httpx.
"""

import ssl
from collections import deque
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import httpx

from tinkex_py.transport.request import HttpRequest

_LONGEST_CONNECT = 10.0
_MOST_REDIRECTS = 5
# Below the 5 s after which common servers close an idle connection, so that we rarely write into a closing one.
_IDLE_CONNECTION_EXPIRY = 4.0
# Of the headers that a client of httpx adds, those that a request of ours has not.
_ADDED_HEADERS = ("accept-encoding", "connection")
# A copy of an answer may come as late as this many answers after it and is still known.
_REMEMBERED_ANSWERS = 8
_COMPARED_BYTES = 1024
# What asyncio takes from a socket at once. httpcore would cut it into four, and each piece costs as much as the whole.
_READ_BYTES = 256 * 1024
# Who is answered so asks again anyway.
_ASKED_AGAIN = frozenset({408, 425, 429})


class HttpConnection:
    """An HTTP client, the socket it opened last, and what it was answered last.

    httpcore forgets the socket of a TLS handshake that is cancelled, so we remember it and close it ourselves.

    Args:
        client: with `httpx.AsyncClient`'s interface.
        ours: it is an `httpx.AsyncClient` of our making, with one connection, which nobody else uses.
    """

    def __init__(self, client: Any, *, ours: bool) -> None:
        self.client = client
        self.ours = ours
        self.added_headers = {name: client.headers[name] for name in _ADDED_HEADERS} if ours else {}
        self._heard: deque[int] = deque(maxlen=_REMEMBERED_ANSWERS)
        self._repeated = False
        self._socket: Any = None

    def is_in_doubt(self, response: Any) -> bool:
        """Whether this answer may be a copy of one that came before over this connection.

        Answers of HTTP/1.1 do not tell which request they are for, so one that somebody on the way sent twice is read
        as the answer to the next request, if it comes behind that. A real answer is rarely the same to the byte, since
        it holds the time or an id; if it is, asking once more does no harm. A connection that brought one is given up,
        also where who is answered so asks again anyway: the answer to this request may still be on its way.
        """
        if not self.ours:
            return False
        body: bytes = response.content
        told = (response.status_code, *response.headers.raw, len(body), body[:_COMPARED_BYTES], body[-_COMPARED_BYTES:])
        heard = hash(told)
        known = heard in self._heard
        self._heard.append(heard)
        self._repeated = known
        return known and not (response.status_code in _ASKED_AGAIN or response.status_code >= 500)

    @property
    def is_clean(self) -> bool:
        """Whether no byte came behind the last answer: the next exchange would take it for its own answer.

        httpcore notices bytes that wait in the socket, but not those that it read together with the answer.
        """
        if self._repeated:
            return False
        # What shows no parser counts as unclean.
        parsers = [getattr(speaker, "_h11_state", None) for speaker in _speakers(self.client)]
        return all(parser is not None and not parser.trailing_data[0] for parser in parsers)

    async def aclose(self) -> None:
        """Closes the client, and the socket if the client has forgotten it."""
        try:
            await self.client.aclose()
        finally:
            if self._socket is not None:
                await self._socket.aclose()

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Hears from httpcore what happens."""
        if event == "connection.connect_tcp.complete":
            self._socket = info["return_value"]
        elif event == "http11.send_request_headers.started":
            for speaker in _speakers(self.client):
                speaker.READ_NUM_BYTES = _READ_BYTES


def new_connection(tls_context: ssl.SSLContext) -> HttpConnection:
    """A connection of our own; it is opened by its first request."""
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_IDLE_CONNECTION_EXPIRY)
    return HttpConnection(httpx.AsyncClient(verify=tls_context, limits=limits), ours=True)


def connection_to_app(app: Any) -> HttpConnection:
    """To a service in this process."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return HttpConnection(httpx.AsyncClient(transport=transport), ours=False)


def load_tls_context() -> ssl.SSLContext:
    """Reads the certificate store."""
    return httpx.create_ssl_context()


async def send_and_follow(connection: HttpConnection, request: HttpRequest) -> Any:
    """The answer at the end of the redirections that a request may follow."""
    url = request.url
    for _ in range(_MOST_REDIRECTS):
        response = await send_once(connection, request, url=url)
        target = request.redirected_to(response.status_code, response.headers.get("location"), url)
        if target is None:
            return response
        url = target
    return await send_once(connection, request, url=url)


async def send_once(
    connection: HttpConnection, request: HttpRequest, *, url: str | None = None, stream: bool = False
) -> Any:
    """One request and its answer.

    Args:
        connection: where it is sent.
        request: what is sent.
        url: where to; default is the request's own.
        stream: leave the body to be read later.
    """
    target = url or request.url
    limit = request.timeout  # of the whole too, which is bounded outside
    timeouts = {"connect": min(limit, _LONGEST_CONNECT), "read": limit, "write": limit, "pool": limit}
    if connection.ours:
        return await _send_directly(connection, request, target, timeouts, stream=stream)
    client = connection.client
    built = client.build_request(
        request.method,
        target,
        headers=dict(request.headers),
        content=request.body(),
        # In this order: any client with httpx's interface takes it.
        timeout=tuple(timeouts[name] for name in ("connect", "read", "write", "pool")),
    )
    return await client.send(built, follow_redirects=False, stream=stream)


async def _send_directly(
    connection: HttpConnection, request: HttpRequest, target: str, timeouts: Mapping[str, float], *, stream: bool
) -> httpx.Response:
    """Past the client, to its transport.

    A client's redirections, authentication, cookies and hooks are not wanted here, and cost as much as the rest.
    """
    client: httpx.AsyncClient = connection.client
    built = httpx.Request(
        request.method,
        _address(target),
        headers={**connection.added_headers, **request.headers},
        content=request.body(),
        extensions={"timeout": timeouts, "trace": connection.trace},
    )
    # The environment may name a proxy for this address.
    transport = client._transport_for_url(built.url)  # pyright: ignore[reportPrivateUsage]
    response = await transport.handle_async_request(built)
    response.request = built
    if stream:
        return response
    try:
        await response.aread()
    except BaseException:
        await response.aclose()
        raise
    return response


def _address(url: str) -> httpx.URL:
    """An address for httpx. One with a query is not kept: it may hold secrets, and comes once."""
    return httpx.URL(url) if "?" in url else _frequent_address(url)


@lru_cache(maxsize=64)
def _frequent_address(url: str) -> httpx.URL:
    # A client asks few addresses many times, and httpx takes 0.1 ms to take one apart.
    return httpx.URL(url)


def _speakers(client: Any) -> Iterator[Any]:
    """What speaks HTTP on each connection of a client of httpx.

    No public name leads there. Where a release of httpcore hides it, what is found instead has no parser: no connection
    is used twice.
    """
    for transport in (client._transport, *client._mounts.values()):
        for connection in () if transport is None else transport._pool.connections:
            inner = connection
            # A connection through a proxy holds the one to the service.
            while not hasattr(inner, "_h11_state") and getattr(inner, "_connection", None) is not None:
                inner = inner._connection
            yield inner
