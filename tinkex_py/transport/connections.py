"""Connections to one service: an httpx transport over httpcore connections with a network backend of our own.

asyncio delivers the bytes of a socket in pieces of up to 256 KiB. The network backends of httpcore cut each into four,
and pause and resume the socket around each read, which costs as much as the rest of a request.
"""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any
from urllib.parse import SplitResult

import httpcore
import httpx

from tinkex_py.errors import ConfigError
from tinkex_py.threads import in_own_thread
from tinkex_py.transport.proxies import DEFAULT_PORTS, ProxyAddress, proxy_for

_LOGGER = logging.getLogger("tinkex_py")
# Below the 5 s after which common servers close an idle connection, so that few requests meet a closing one.
_IDLE_CONNECTION_EXPIRY = 4.0
# Unread bytes above this pause the socket.
_READ_AHEAD = 1 << 20
# Smaller writes are sent together at the next read, so that head and body of a request are one packet.
_WRITE_TOGETHER = 1 << 16
# Seconds for each address of a host except the last one.
_TIMEOUT_PER_ADDRESS = 2.0


class LeftoverResponse(httpcore.ReadError):
    """A response arrived before its request was sent, so it belongs to an earlier one."""


class SocketTransport(httpx.AsyncBaseTransport):
    """One connection for every running exchange; survives any number of cancelled exchanges.

    The pool of httpcore loses connections to cancelled requests (encode/httpcore#830, #1093). Here every connection
    has a pool of its own, and is closed if its exchange did not end cleanly.

    Args:
        service: the service's address.

    Attributes:
        proxy: the proxy that the environment names for the service, or None.

    Raises:
        ConfigError: the environment names an unusable proxy.
    """

    def __init__(self, service: SplitResult) -> None:
        self.proxy = proxy_for(service)
        self._needs_certificates = service.scheme == "https" or (
            self.proxy is not None and self.proxy.scheme == "https"
        )
        self._idle: list[_Connection] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._tls: asyncio.Task[ssl.SSLContext] | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request. The connection belongs to the response until it is closed or read completely.

        Raises:
            httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException: the exchange failed.
            ConfigError: the certificate store cannot be loaded.
        """
        connection = self._reusable() or await self._new_connection(request.url)
        try:
            response = await connection.send(request)
        except BaseException:
            self._discard(connection)
            raise
        body = _ResponseBody(response, functools.partial(self._give_back, connection))
        return httpx.Response(response.status, headers=response.headers, stream=body)

    async def aclose(self) -> None:
        """Closes idle connections now, the others after their exchanges; waits for connections that are closing."""
        self._closed = True
        while self._idle:
            self._discard(self._idle.pop())
        while self._closing:
            await asyncio.wait(self._closing)
        if self._tls is not None:
            await asyncio.wait([self._tls])
            self._tls.exception()  # marks it as retrieved: the exchange that needed it may have been cancelled

    def _reusable(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if not connection.has_ended:
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
        if connection.ended_cleanly and not self._closed:
            self._idle.append(connection)
        else:
            self._discard(connection)

    def _discard(self, connection: "_Connection") -> None:
        # In its own task: a second cancellation of the caller cannot interrupt it.
        task = asyncio.create_task(connection.aclose(), name="tinkex.http.close")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Connection:
    """One httpcore connection, opened by its first request."""

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
    def ended_cleanly(self) -> bool:
        """Whether the latest exchange is complete, so that another one can follow."""
        return self._exchanges.is_available()

    @property
    def has_ended(self) -> bool:
        """Whether it was idle for too long, the peer closed it, or unexpected bytes arrived."""
        return self._exchanges.has_expired()

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
        except Exception as error:  # noqa: BLE001  (closing a broken connection may fail in any way)
            _LOGGER.debug("closing a connection failed: %s", type(error).__name__)
        finally:
            await self._network.aclose()


class _ResponseBody(httpx.AsyncByteStream):
    """The body of a response; closing it returns the connection."""

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
    auth = None
    if proxy.credentials is not None:
        user, password = proxy.credentials
        auth = user.encode(), password.encode()
    return httpcore.Proxy(url, auth=auth, ssl_context=tls if proxy.scheme == "https" else None)


class HandshakeFailed(httpcore.ConnectError):
    """The TLS handshake failed, or the peer ended it."""


class SocketStream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One TCP connection, with or without TLS.

    Reads and writes have no timeout: `HttpClient` limits the time of the whole exchange.

    Attributes:
        has_read_since_write: whether anything was read after the latest write.
    """

    def __init__(self) -> None:
        self.has_read_since_write = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unwritten = bytearray()
        self._unread: deque[bytes] = deque()
        self._unread_size = 0
        self._ended = False
        self._error: Exception | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport; after `start_tls` the encrypting one."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keeps bytes until they are read."""
        self._unread.append(data)
        self._unread_size += len(data)
        if self._unread_size > _READ_AHEAD and self._transport is not None:
            self._transport.pause_reading()
        _finish(self._arrival)

    def eof_received(self) -> None:
        """The peer has ended its side; asyncio closes the transport."""
        self._ended = True
        _finish(self._arrival)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wakes everything that waits for this connection."""
        self._ended, self._error = True, exc
        _finish(self._arrival)
        _finish(self._drained)

    def pause_writing(self) -> None:
        """Makes writers wait until the peer has read more."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """Resumes writers."""
        _finish(self._drained)
        self._drained = None

    # Called by httpcore

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        """Returns all bytes that have arrived; empty at the end.

        Raises:
            httpcore.ReadError: the connection broke.
        """
        self.has_read_since_write = True
        if self._unwritten:
            self._write_through()
        if not self._unread and not self._ended:
            self._arrival = self._loop.create_future()
            await self._arrival
        if self._unread:
            data = self._unread[0] if len(self._unread) == 1 else b"".join(self._unread)
            if self._unread_size > _READ_AHEAD and self._transport is not None and not self._ended:
                self._transport.resume_reading()
            self._unread.clear()
            self._unread_size = 0
            return data
        if self._error is not None:
            raise httpcore.ReadError(str(self._error)) from self._error
        return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        """Sends bytes; small writes are collected until the next read.

        Raises:
            httpcore.WriteError: the connection has ended.
        """
        if not buffer:
            return
        self.has_read_since_write = False
        self._unwritten += buffer
        if len(self._unwritten) > _WRITE_TOGETHER:
            self._write_through()
            if self._drained is not None:
                await self._drained
        if self._ended:
            raise httpcore.WriteError(str(self._error or "the peer closed the connection"))

    def _write_through(self) -> None:
        unwritten, self._unwritten = self._unwritten, bytearray()
        if self._transport is not None and not self._ended:
            self._transport.write(unwritten)

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "SocketStream":
        """Encrypts this connection.

        Raises:
            HandshakeFailed, httpcore.ConnectTimeout: the handshake failed, or took too long.
        """
        assert self._transport is not None
        try:
            async with asyncio.timeout(timeout):
                encrypting = await self._loop.start_tls(
                    self._transport, self, ssl_context, server_hostname=server_hostname
                )
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("the TLS handshake took too long") from error
        except OSError as error:
            raise HandshakeFailed(str(error)) from error
        if encrypting is None:
            raise HandshakeFailed("the peer closed the connection")
        self._transport = encrypting
        return self

    async def aclose(self) -> None:
        """Closes the socket at once; a second call does nothing."""
        if self._transport is not None:
            self._transport.abort()
            await asyncio.sleep(0)  # asyncio closes the socket in the next iteration of the loop

    def get_extra_info(self, info: str) -> Any:
        """`is_readable` is whether bytes or the end arrived without a read; all else comes from asyncio."""
        if info == "is_readable":
            return bool(self._unread) or self._ended
        return None if self._transport is None else self._transport.get_extra_info(info)


class NetworkBackend(httpcore.AsyncNetworkBackend):
    """Opens the socket of one httpcore connection, and remembers its stream.

    httpcore 1.0.9 never closes the stream of a cancelled TLS handshake (no upstream issue); `aclose` closes it.

    Attributes:
        stream: the latest stream; None before the first one.
    """

    def __init__(self) -> None:
        self.stream: SocketStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> SocketStream:
        """Opens a connection.

        Raises:
            httpcore.ConnectError, httpcore.ConnectTimeout: connecting failed, or took too long.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("connecting took too long") from error
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error

    async def _connect(self, host: str, port: int) -> SocketStream:
        # The addresses in sequence: asyncio's `happy_eyeballs_delay` leaks the sockets of a cancelled connect.
        loop = asyncio.get_running_loop()
        *first, last = await _addresses(loop, host)
        for address in first:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_TIMEOUT_PER_ADDRESS):
                    return await self._connect_to(loop, address, port)
        return await self._connect_to(loop, last, port)

    async def _connect_to(self, loop: asyncio.AbstractEventLoop, address: str, port: int) -> SocketStream:
        stream = self.stream = SocketStream()
        await loop.create_connection(lambda: stream, address, port)
        return stream

    async def aclose(self) -> None:
        """Closes the stream."""
        if self.stream is not None:
            await self.stream.aclose()


async def _addresses(loop: asyncio.AbstractEventLoop, host: str) -> list[str]:
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]  # `getaddrinfo` would use a thread
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for _, _, _, _, address in found))


def _finish(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
