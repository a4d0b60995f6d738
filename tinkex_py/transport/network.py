"""TCP and TLS for httpcore on asyncio's own transports.

asyncio hands over what a socket holds in pieces of up to 256 KiB; the backends of httpcore cut them into four, and
pause and resume the socket around each read, which costs as much as the rest of a request.
"""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections import deque
from collections.abc import Iterable
from typing import Any

import httpcore

# Unread bytes above this pause the socket.
_READ_AHEAD = 1 << 20
# Seconds for each address of a host but its last one.
_PATIENCE_PER_ADDRESS = 2.0


class SocketStream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One TCP connection, with or without TLS.

    Reads and writes have no timeout of their own: whoever exchanges bounds the whole exchange.

    Attributes:
        has_read_since_write: whether anything was read after the latest write.
    """

    def __init__(self) -> None:
        self.has_read_since_write = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
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
        """The peer sends nothing more; asyncio closes the transport."""
        self._ended = True
        _finish(self._arrival)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wakes everything that waits for this connection."""
        self._ended, self._error = True, exc
        _finish(self._arrival)
        _finish(self._drained)

    def pause_writing(self) -> None:
        """Lets writers wait until the peer has taken more."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """Lets writers go on."""
        _finish(self._drained)
        self._drained = None

    # Called by httpcore

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        """All bytes that have arrived, however many; empty at the end.

        Raises:
            httpcore.ReadError: the connection broke.
        """
        self.has_read_since_write = True
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
        """Sends bytes.

        Raises:
            httpcore.WriteError: the connection is over.
        """
        if not buffer:
            return
        self.has_read_since_write = False
        if self._transport is not None and not self._ended:
            self._transport.write(buffer)
            if self._drained is not None:
                await self._drained
        if self._ended:
            raise httpcore.WriteError(str(self._error or "the peer has closed the connection"))

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "SocketStream":
        """Encrypts this connection from here on.

        Raises:
            httpcore.ConnectError, httpcore.ConnectTimeout: the handshake failed, or did not end in time.
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
            raise httpcore.ConnectError(str(error)) from error
        if encrypting is None:  # the peer left during the handshake
            raise httpcore.ConnectError("the connection broke during the TLS handshake")
        self._transport = encrypting
        return self

    async def aclose(self) -> None:
        """Closes the socket at once; a second call does nothing."""
        if self._transport is not None:
            self._transport.abort()
            await asyncio.sleep(0)  # asyncio closes the socket in its next turn

    def get_extra_info(self, info: str) -> Any:
        """`is_readable` is whether bytes or the end came unasked; all else is asyncio's."""
        if info == "is_readable":
            return bool(self._unread) or self._ended
        return None if self._transport is None else self._transport.get_extra_info(info)


class NetworkBackend(httpcore.AsyncNetworkBackend):
    """Connects for one connection of httpcore, and remembers its stream.

    httpcore 1.0.9 forgets the stream of a TLS handshake that is cancelled (encode/httpcore#1093); `aclose` closes it.

    Attributes:
        stream: what was opened; None before.
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
            httpcore.ConnectError, httpcore.ConnectTimeout: nothing answers there, or not in time.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("connecting took too long") from error
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error

    async def _connect(self, host: str, port: int) -> SocketStream:
        """Tries one address of the host after another.

        Not at the same time: asyncio's `happy_eyeballs_delay` leaks the sockets of a cancelled connect.
        """
        loop = asyncio.get_running_loop()
        *first, last = await _addresses(loop, host)
        for address in first:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_PATIENCE_PER_ADDRESS):
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
        return [str(ipaddress.ip_address(host))]  # asked of nothing, and so in no thread
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for _, _, _, _, address in found))


def _finish(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
