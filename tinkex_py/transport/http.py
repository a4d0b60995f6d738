"""HTTP exchanges with one service: headers, redirects, time limits, events and closing."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast
from urllib.parse import unquote_plus, urlsplit

import httpx

from tinkex_py.errors import ClientClosed, ConnectionFailed, TimeoutExceeded
from tinkex_py.limits import time_limit
from tinkex_py.telemetry import Measurements, lifecycle, request_headers
from tinkex_py.transport.adapters import ClientTransport
from tinkex_py.transport.bodies import ACCEPTED_ENCODINGS, SMALL_BODY, BodyTooLarge, body_of
from tinkex_py.transport.connections import SocketTransport
from tinkex_py.transport.failures import typed_failure
from tinkex_py.transport.messages import (
    NO_HEADERS,
    NO_SECRET,
    Request,
    Response,
    Secret,
    checked_base_url,
    may_be_key,
    merged_headers,
    same_origin,
)
from tinkex_py.transport.proxies import ProxyAddress
from tinkex_py.transport.secrecy import CutOff, cut_off, exchanging, hides_arguments
from tinkex_py.version import __version__

Transport = httpx.AsyncBaseTransport
Result = TypeVar("Result")

USER_AGENT = f"tinkex-py/{__version__}"
LONGEST_RESPONSE = 16 << 20
"""Bytes of a response that is not a result of a pass or sample."""

_LONGEST_CONNECT = 10.0
_MOST_REDIRECTS = 5
_MOST_OF_AN_ERROR = 1 << 16
_CLOSED_MEANWHILE = "this client was closed during the request"

# A client requests few URLs many times, and httpx takes 0.1 ms to parse one.
_frequent_url = lru_cache(maxsize=64)(httpx.URL)


class HttpClient:
    """Exchanges with one service. The constructor does no I/O.

    The client belongs to the event loop of its first exchange; close it there.

    Args:
        base_url: where the service is; a path in it is prepended to every path.
        transport: sends the requests without a limit on their number; None opens up to `max_connections` connections.
        timeout: seconds for one exchange, from having a connection to the last byte.
        max_connections: maximum number of concurrent exchanges; others wait in order.
        headers: sent with every request; values that are long enough to be keys are redacted from messages.
        max_response_bytes: maximum size of a response after decompression; streamed responses have none.

    Raises:
        ConfigError: the address is invalid, or the environment names an unusable proxy.
    """

    @hides_arguments
    def __init__(
        self,
        *,
        base_url: str,
        transport: Transport | None = None,
        timeout: float = 60.0,
        max_connections: int = 16,
        headers: Mapping[str, str] = NO_HEADERS,
        max_response_bytes: int = LONGEST_RESPONSE,
    ) -> None:
        self._base = checked_base_url(base_url)
        self._root = self._base.geturl().rstrip("/")
        self._given_transport = transport
        self._proxy: ProxyAddress | None = None
        self._slots: AbstractAsyncContextManager[None] = contextlib.nullcontext()
        if transport is None:
            transport = SocketTransport(self._base)
            self._proxy = transport.proxy
            self._slots = asyncio.Semaphore(max_connections)
        self._transport = transport
        self._timeout = timeout
        self._given_headers = headers
        self._max_response_bytes = max_response_bytes
        self._headers = merged_headers({"User-Agent": USER_AGENT, "Accept-Encoding": ACCEPTED_ENCODINGS}, headers)
        self._secrets = [value for value in headers.values() if may_be_key(value)]
        self._secrets += [] if self._proxy is None else self._proxy.secrets
        self._may_trace = True
        self._loop: asyncio.AbstractEventLoop | None = None
        self._limits: set[asyncio.Timeout] = set()
        self._exchanges = 0
        self._elsewhere: set[HttpClient] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    def __repr__(self) -> str:
        return f"HttpClient(base_url={self._base.geturl()!r}, closed={self._closed})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("an HttpClient holds connections of this process: create a new one instead of pickling it")

    @property
    def host(self) -> str:
        """Host (and port) of the service, for messages."""
        return self._base.netloc

    async def exchange(self, request: Request, *, key: Secret = NO_SECRET, attempt: int = 1) -> Response:
        """Sends one request and returns the whole response, whatever its status. Does not retry.

        Args:
            request: the request.
            key: sent as `X-API-Key`.
            attempt: number of the caller's attempt, for events.

        Raises:
            ConnectionFailed: there is no connection, or it broke.
            TimeoutExceeded: the response was not complete in time.
            InvalidResponse: the response is not HTTP, is too large, or cannot be decompressed.
            ClientClosed: this client is closed, or belongs to another event loop.
            InvalidData: the path or a header cannot be sent.
        """
        name, seconds = self._name_and_seconds(request)
        async with self._exchanging(request, attempt) as measurements:
            began: list[httpx.Response] = []
            try:
                raw, body = await self.bounded(self._whole(request, key, seconds, began), name, seconds)
            except TimeoutExceeded as error:
                if began:
                    error.response_began = True
                    error.args = (str(error).replace("no response within", "no complete response within"),)
                raise
            measurements |= {"status": raw.status_code, "bytes": len(body)}
            secret = key.with_others(self._secrets)
            headers = dict(raw.headers.items())
            return Response(raw.status_code, headers, body, name, secret, self._max_response_bytes)

    @asynccontextmanager
    async def stream(
        self, request: Request, *, key: Secret = NO_SECRET, attempt: int = 1
    ) -> AsyncGenerator["ResponseStream", None]:
        """Sends one request, whose response is read piece by piece. Neither retries nor follows redirects.

        Arguments and errors are those of `exchange`; the timeout limits the time until the response begins, and between
        two pieces. The response of a service in this process is complete, and in memory, before it can be read.
        """
        name, seconds = self._name_and_seconds(request)
        async with self._exchanging(request, attempt) as measurements:
            sending = self._send(request, key, f"{self._root}/{request.path.lstrip('/')}", seconds)
            raw = await self.bounded(sending, name, seconds)
            response = ResponseStream(self, raw, name, key.with_others(self._secrets), seconds)
            try:
                yield response
            finally:
                measurements |= {"status": response.status, "bytes": response.received}
                await raw.aclose()

    @asynccontextmanager
    async def towards(
        self, url: Secret, *, key: Secret = NO_SECRET
    ) -> AsyncGenerator[tuple["HttpClient", Secret, Secret], None]:
        """Opens a client for a URL that the service returned; yields it, the path to request, and the key to send.

        The URL may be signed, so it and its path are secrets, and the long values of its query are redacted as keys.

        The key and the headers of this client are sent to the origin of `base_url` only. (A user's own `http_client`
        always sends its own headers.)

        Args:
            url: the URL.
            key: the key of this client.

        Raises:
            ConfigError: the URL is not an http(s) address.
            ClientClosed: this client is closed.
        """
        self._require_usable()
        with CutOff():
            base, path = _parts_of(url)
        at_home = same_origin(base, self._base.geturl())
        shares_transport = at_home or isinstance(self._given_transport, ClientTransport)
        client = HttpClient(
            base_url=base,
            transport=self._given_transport if shares_transport else None,
            timeout=self._timeout,
            max_connections=1,
            headers=self._given_headers if at_home else NO_HEADERS,
            max_response_bytes=self._max_response_bytes,
        )
        client._may_trace = at_home
        client._secrets += _long_values_of_query(url)
        self._elsewhere.add(client)
        try:
            yield client, path, key if at_home else NO_SECRET
        finally:
            self._elsewhere.discard(client)
            await client.aclose()

    async def aclose(self) -> None:
        """Closes all connections; running exchanges raise ClientClosed. A second call does nothing.

        Raises:
            ClientClosed: the client belongs to another event loop, which must close it.
        """
        if self._loop is None:
            self._closed = True
            return
        self._require_own_loop()
        self._closed = True
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(self._loop.time())
        for client in list(self._elsewhere):
            await client.aclose()
        await self._idle.wait()
        await self._transport.aclose()

    def _require_usable(self) -> None:
        if self._closed:
            raise ClientClosed("this client is closed; create a new one")
        self._require_own_loop()

    def _require_own_loop(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise ClientClosed(
                "this client belongs to the event loop of its first request, and this is another one: "
                "create one client per event loop, and close it there"
            )

    @asynccontextmanager
    async def _exchanging(self, request: Request, attempt: int) -> AsyncGenerator[Measurements]:
        """One exchange, with its events. Waits for a free connection."""
        if self._closed or self._loop is not asyncio.get_running_loop():
            self._require_usable()
        path = f"{self._base.path.rstrip('/')}/{request.path.partition('?')[0].lstrip('/')}"
        metadata = {"method": request.method, "path": path, "attempt": attempt}
        self._exchanges += 1
        self._idle.clear()
        try:
            async with self._slots:
                if self._closed:
                    raise ClientClosed(_CLOSED_MEANWHILE)
                with lifecycle("tinkex.http.request", metadata) as measurements:
                    yield measurements
        finally:
            self._exchanges -= 1
            if not self._exchanges:
                self._idle.set()

    async def bounded(
        self, work: Coroutine[Any, Any, Result], request: str, seconds: float, too_late: str | None = None
    ) -> Result:
        """Awaits a part of an exchange with a time limit; raises its failures as typed errors without a cause.

        Args:
            work: the part.
            request: names the exchange in errors.
            seconds: the limit.
            too_late: the message of the timeout; by default that there was no response.
        """
        if self._closed:  # closed between two parts of a stream
            work.close()
            raise ClientClosed(_CLOSED_MEANWHILE)

        def expired() -> TimeoutExceeded | ClientClosed:
            if self._closed:
                return ClientClosed(_CLOSED_MEANWHILE)
            through = "" if self._proxy is None else f", through {self._proxy}"
            return TimeoutExceeded(f"{too_late or f'{request}: no response within {seconds:g} s'}{through}")

        async with time_limit(seconds, expired) as limit:
            self._limits.add(limit)
            exchanging.set(True)
            try:
                return await work
            except BaseException as error:
                failure = typed_failure(error, request, seconds, self._proxy)
                cut_off(error)  # its frames hold the headers, also when it is a cancellation
                if failure is None:
                    raise
            finally:
                exchanging.set(False)
                self._limits.discard(limit)
            raise failure

    async def _whole(
        self, request: Request, key: Secret, seconds: float, began: list[httpx.Response]
    ) -> tuple[httpx.Response, bytes]:
        """Follows the redirects that the request may follow, and returns the last response and its body.

        `began` receives every response as soon as its headers have arrived.
        """
        url = f"{self._root}/{request.path.lstrip('/')}"
        redirects = 0
        while True:
            raw = await self._send(request, key, url, seconds)
            began.append(raw)
            body = await self._read(raw)
            if not raw.is_redirect or redirects == _MOST_REDIRECTS:
                return raw, body
            target = request.redirected_to(raw.status_code, raw.headers.get("location"), url)
            if target is None:
                return raw, body
            url = target
            redirects += 1

    async def _read(self, raw: httpx.Response) -> bytes:
        """Returns the decompressed body of a response, and closes the response."""
        if raw.is_closed:  # a user's own client has read it
            return raw.content
        parts: deque[bytes] = deque()
        size = 0
        try:
            async with aclosing(cast("AsyncGenerator[bytes]", raw.aiter_raw())) as pieces:
                async for piece in pieces:
                    size += len(piece)
                    if size > self._max_response_bytes:
                        raise BodyTooLarge(self._max_response_bytes)
                    parts.append(piece)
        finally:
            await raw.aclose()
        encoding = raw.headers.get("content-encoding", "")
        if not encoding and size <= SMALL_BODY:
            return b"".join(parts)
        return await body_of(parts, encoding, self._max_response_bytes)

    async def _send(self, request: Request, key: Secret, url: str, seconds: float) -> httpx.Response:
        traced = request_headers() if self._may_trace else NO_HEADERS
        authorized = {"x-api-key": key.reveal()} if key else {}
        timeouts = {"connect": min(seconds, _LONGEST_CONNECT), "read": seconds, "write": seconds, "pool": seconds}
        return await self._transport.handle_async_request(
            httpx.Request(
                request.method,
                # A URL with a query is not cached: it may contain secrets, and occurs once.
                httpx.URL(url) if "?" in url else _frequent_url(url),
                headers={**traced, **self._headers, **request.headers, **authorized},
                content=request.body(),
                extensions={"timeout": timeouts},
            )
        )

    def _name_and_seconds(self, request: Request) -> tuple[str, float]:
        """The name of an exchange in messages, without the query, which may contain secrets; and its time limit."""
        name = f"{request.method} /{request.path.partition('?')[0].lstrip('/')} at {self._base.netloc}"
        return name, self._timeout if request.timeout is None else request.timeout


def _parts_of(url: Secret) -> tuple[str, Secret]:
    """Returns the address of the host, and the path with its query."""
    parts = urlsplit(url.reveal())
    base = checked_base_url(f"{parts.scheme}://{parts.netloc}").geturl()
    return base, Secret(f"{parts.path}?{parts.query}" if parts.query else parts.path)


def _long_values_of_query(url: Secret) -> set[str]:
    """Returns values that may be signatures, as they are sent and as they are meant."""
    values = [pair.partition("=")[2] for pair in urlsplit(url.reveal()).query.split("&")]
    return {form for value in values if may_be_key(value) for form in (value, unquote_plus(value))}


class ResponseStream:
    """Status and headers of a response, and its body, which is still to be read.

    Attributes:
        status: HTTP status code.
        headers: names in lower case.
        received: bytes of the body so far.
    """

    def __init__(self, client: HttpClient, raw: httpx.Response, request: str, secret: Secret, seconds: float) -> None:
        self.status: int = raw.status_code
        self.headers: dict[str, str] = dict(raw.headers.items())
        self.received = 0
        self._client = client
        self._raw = raw
        self._request = request
        self._secret = secret
        self._seconds = seconds

    @property
    def length(self) -> int | None:
        """Bytes of the whole body; None if the service did not announce them."""
        announced = self.headers.get("content-length", "")
        return int(announced) if announced.isdecimal() else None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yields the body once, as it arrives, and not decompressed: `length` and ranges count these bytes.

        Raises:
            ConnectionFailed: the connection broke before the end of the body.
            TimeoutExceeded: nothing arrived for the request's timeout.
        """
        async with aclosing(cast("AsyncGenerator[bytes]", self._raw.aiter_raw())) as body:
            silent = f"{self._request}: no more data for {self._seconds:g} s"
            while (piece := await self._client.bounded(_next(body), self._request, self._seconds, silent)) is not None:
                self.received += len(piece)
                yield piece
        if self.length is not None and self.received != self.length:
            raise ConnectionFailed(f"{self._request}: the response has {self.received} of {self.length} bytes")

    async def beginning(self) -> Response:
        """Returns the response with at most the first 64 KiB of its body; for errors and redirects."""
        body = bytearray()
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) >= _MOST_OF_AN_ERROR:
                    break
        return Response(self.status, self.headers, bytes(body[:_MOST_OF_AN_ERROR]), self._request, self._secret)


async def _next(body: AsyncGenerator[bytes]) -> bytes | None:
    return await anext(body, None)
