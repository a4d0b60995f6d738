"""Connections to one service, behind httpx's public seam for transports."""

import asyncio
import functools
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from urllib.parse import SplitResult

import httpcore
import httpx

from tinkex_py.errors import ConfigError
from tinkex_py.threads import in_own_thread
from tinkex_py.transport.network import NetworkBackend
from tinkex_py.transport.proxies import DEFAULT_PORTS, ProxyAddress, proxy_for

_LOGGER = logging.getLogger("tinkex_py")
# Below the 5 s after which common servers close an idle connection, so that we rarely write into a closing one.
_IDLE_CONNECTION_EXPIRY = 4.0


class LeftoverResponse(httpcore.ReadError):
    """A response that was there before its request had been sent: it belongs to an earlier one."""


class SocketTransport(httpx.AsyncBaseTransport):
    """A connection for every exchange under way; survives any number of cancelled exchanges.

    httpx's own transport loses places in its pool to cancelled requests (encode/httpcore#830, #1093). Here every
    connection is one of httpcore's for itself, and one whose exchange did not end cleanly is closed.

    Args:
        service: the service's address.

    Attributes:
        proxy: what the environment names between here and the service; None is nothing.

    Raises:
        ConfigError: the environment names a proxy that cannot be used.
    """

    def __init__(self, service: SplitResult) -> None:
        self.proxy = proxy_for(service)
        self._needs_certificates = service.scheme == "https" or (
            self.proxy is not None and self.proxy.scheme == "https"
        )
        # Which encodings can be read depends on what is installed beside httpx.
        self._encodings: str = httpx.AsyncClient(transport=self).headers["accept-encoding"]
        self._idle: list[_Connection] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._tls: asyncio.Task[ssl.SSLContext] | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request; the connection is kept until the response is closed.

        Raises:
            httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException: the exchange failed.
            ConfigError: the certificate store cannot be loaded.
        """
        request.headers.setdefault("accept-encoding", self._encodings)
        connection = self._reusable() or await self._new_connection(request.url)
        try:
            response = await connection.send(request)
        except BaseException:
            self._discard(connection)
            raise
        body = _Body(response, functools.partial(self._give_back, connection))
        return httpx.Response(response.status, headers=response.headers, stream=body)

    async def aclose(self) -> None:
        """Closes idle connections now and every other one when its exchange is over; waits for all closings so far."""
        self._closed = True
        while self._idle:
            self._discard(self._idle.pop())
        while self._closing:
            await asyncio.wait(self._closing)
        if self._tls is not None:
            await asyncio.wait([self._tls])
            self._tls.exception()  # retrieved: the exchange that needed it may have been cancelled

    def _reusable(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            self._discard(connection)
        return None

    async def _new_connection(self, url: httpx.URL) -> "_Connection":
        if self._tls is None or (self._tls.done() and self._tls.exception()):
            self._tls = asyncio.create_task(self._load_tls_context(), name="tinkex.tls")
        context = await asyncio.shield(self._tls)
        port = url.port or DEFAULT_PORTS[url.scheme]
        return _Connection(httpcore.Origin(url.raw_scheme, url.raw_host, port), context, self.proxy)

    async def _load_tls_context(self) -> ssl.SSLContext:
        if not self._needs_certificates:
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            return await in_own_thread("tinkex-tls", httpx.create_ssl_context)
        except OSError as error:
            raise ConfigError(
                f"the certificate store cannot be loaded ({type(error).__name__}); check SSL_CERT_FILE and SSL_CERT_DIR"
            ) from error

    def _give_back(self, connection: "_Connection") -> None:
        if connection.is_reusable and not self._closed:
            self._idle.append(connection)
        else:
            self._discard(connection)

    def _discard(self, connection: "_Connection") -> None:
        # In a task of its own: a second cancellation of the caller cannot interrupt the closing.
        task = asyncio.create_task(connection.aclose(), name="tinkex.http.close")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Connection:
    """One connection of httpcore, opened by its first request."""

    def __init__(self, origin: httpcore.Origin, tls: ssl.SSLContext, proxy: ProxyAddress | None) -> None:
        self._network = NetworkBackend()
        pool = httpcore.AsyncConnectionPool(
            ssl_context=tls,
            proxy=None if proxy is None else _httpcore_proxy(proxy, tls),
            keepalive_expiry=_IDLE_CONNECTION_EXPIRY,
            network_backend=self._network,
        )
        self._exchanges = pool.create_connection(origin)

    @property
    def is_reusable(self) -> bool:
        """Whether the latest exchange ended cleanly, and the peer has neither closed nor said anything since."""
        return self._exchanges.is_available() and not self._exchanges.has_expired()

    async def send(self, request: httpx.Request) -> httpcore.Response:
        url = request.url
        response = await self._exchanges.handle_async_request(
            httpcore.Request(
                request.method,
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        stream = self._network.stream
        if stream is not None and not stream.has_read_since_write:
            raise LeftoverResponse("a response arrived before its request was sent")
        return response

    async def aclose(self) -> None:
        try:
            await self._exchanges.aclose()
        except Exception as error:  # noqa: BLE001  (a broken connection may fail to close in any way)
            _LOGGER.debug("closing a connection failed: %s", type(error).__name__)
        finally:
            await self._network.aclose()


class _Body(httpx.AsyncByteStream):
    """The body of a response; closing it gives the connection back."""

    def __init__(self, response: httpcore.Response, give_back: Callable[[], None]) -> None:
        self._response = response
        self._give_back = give_back
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._response.aiter_stream():
            yield part

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._response.aclose()
        finally:
            self._give_back()


def _httpcore_proxy(proxy: ProxyAddress, tls: ssl.SSLContext) -> httpcore.Proxy:
    scheme = proxy.scheme.encode()
    url = httpcore.URL(scheme=scheme, host=proxy.host.encode(), port=proxy.port, target=b"/")
    return httpcore.Proxy(url, auth=proxy.credentials, ssl_context=tls if proxy.scheme == "https" else None)
