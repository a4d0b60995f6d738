"""What the test servers share: a TCP server on 127.0.0.1 that a test can wait for, and HTTP/1.1 parsing with h11."""

import asyncio
import socket
import ssl
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Self

import h11

PIECE = 1 << 16
_SECONDS = 30.0


class LoopbackServer(ABC):
    """A server on a free port; an async context manager.

    Attributes:
        connections: how many connections were accepted so far.
        tasks: tasks of the open connections.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.port = 0
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.writers: set[asyncio.StreamWriter] = set()
        self._listener: socket.socket | None = None
        self._accepted: set[socket.socket] = set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self.listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_listening()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for accepted in self._accepted:
            accepted.close()

    @abstractmethod
    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        """Serves one connection, the `number`-th, until it ends."""

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self.writers)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that requests, responses or connections make true."""
        async with asyncio.timeout(_SECONDS):
            while not condition():
                await self._changed.wait()

    def changed(self) -> None:
        """Lets `until` check its condition again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def listen(self) -> None:
        # asyncio's own server leaves a connection open that is accepted in the moment of its closing.
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=100)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    @property
    def is_listening(self) -> bool:
        return self._listener is not None

    def stop_listening(self) -> None:
        """Refuses connections from now on; open ones stay open."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Runs a task that ends with the server."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except ConnectionError:  # the client has left already
                continue
            except BlockingIOError:  # there are no more
                return
            self._accepted.add(accepted)
            self.start(self._connect(accepted))

    async def _connect(self, accepted: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=1 << 20)
        protocol = asyncio.StreamReaderProtocol(reader, self._serve)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, accepted)
        self._accepted.discard(accepted)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.writers.add(writer)
        self.connections += 1
        self.changed()
        try:
            await self.serve_connection(reader, writer, self.connections)
        except (OSError, EOFError, asyncio.CancelledError):
            # The client or the service left, or the test is over: this ends the connection and nothing else.
            writer.transport.abort()
        finally:
            writer.close()
            self.writers.discard(writer)
            self.tasks.discard(task)
            self.changed()


def reset_connection(writer: asyncio.StreamWriter) -> None:
    """Closes a connection with RST instead of FIN."""
    raw: socket.socket | None = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def new_parser(before: h11.Connection | None = None) -> h11.Connection:
    """Returns a parser for the next request of a connection, with what has arrived of it already."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    data, closed = before.trailing_data if before is not None else (b"", False)
    if data:
        parser.receive_data(data)
    if closed:
        parser.receive_data(b"")
    return parser


async def next_event(parser: h11.Connection, reader: asyncio.StreamReader) -> object:
    """Returns the next event of a connection; ConnectionClosed if its bytes are not HTTP."""
    try:
        while (event := parser.next_event()) is h11.NEED_DATA:
            parser.receive_data(await reader.read(PIECE))
    except h11.RemoteProtocolError:
        return h11.ConnectionClosed()
    return event


async def read_body(parser: h11.Connection, reader: asyncio.StreamReader) -> bytes | None:
    """Returns the body of a request; None if the connection ended before it was complete."""
    body = bytearray()
    while isinstance(event := await next_event(parser, reader), h11.Data):
        body += event.data
    return bytes(body) if isinstance(event, h11.EndOfMessage) else None
