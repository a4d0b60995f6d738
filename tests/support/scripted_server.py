"""A real HTTP/1.1 server on loopback whose answers, delays and breakdowns a test dictates.

    async with ScriptedServer() as server:
        server.script("/api/v1/thing", answer(503), answer(json={"ok": True}))
        ...
        await server.until(lambda: len(server.requests_to("/api/v1/thing")) == 2)

Each request to a path takes the next behaviour of its script; the last one is repeated.
"""

import asyncio
import itertools
import json as json_module
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import h11


@dataclass(frozen=True)
class Request:
    """A request as it arrived; header names in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def json(self) -> Any:
        return json_module.loads(self.body)


@dataclass
class Exchange:
    """What a behaviour works with. `request` is None for a behaviour that runs before the body was read."""

    server: "ScriptedServer"
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: h11.Request
    request: Request | None = None
    keep_alive: bool = True

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        # Real servers tell the time, so no answer of theirs is the same as another to the byte.
        lines = [f"HTTP/1.1 {status} Scripted", f"content-length: {len(body)}", f"answer: {next(self.server.answers)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        payload = b"" if self.head.method == b"HEAD" else body
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + payload)


@dataclass(frozen=True)
class Behaviour:
    """How one request is treated."""

    act: Callable[[Exchange], Awaitable[None]]
    before_body: bool = False


def answer(
    status: int = 200, body: bytes = b"", *, json: object | None = None, headers: Mapping[str, str] | None = None
) -> Behaviour:
    """Answer at once."""
    payload = body if json is None else json_module.dumps(json).encode()
    kind = "application/octet-stream" if json is None else "application/json"
    sent = {"content-type": kind, **(headers or {})}

    async def act(exchange: Exchange) -> None:
        await exchange.send_answer(status, sent, payload)

    return Behaviour(act)


def computed(make: Callable[[Request], Behaviour]) -> Behaviour:
    """Choose the behaviour from the request."""

    async def act(exchange: Exchange) -> None:
        assert exchange.request is not None
        await make(exchange.request).act(exchange)

    return Behaviour(act)


def held(release: asyncio.Event, then: Behaviour) -> Behaviour:
    """Wait for an event, then go on with another behaviour."""

    async def act(exchange: Exchange) -> None:
        await release.wait()
        await then.act(exchange)

    return Behaviour(act)


def stall() -> Behaviour:
    """Never answer; ends when the client closes the connection."""

    async def act(exchange: Exchange) -> None:
        exchange.keep_alive = False
        await exchange.reader.read()

    return Behaviour(act)


def stop_reading() -> Behaviour:
    """Do not read the body, so that a client with a large one is stuck in the middle of sending.

    A connection that is not read does not show that its client left: set `server.reading_again` to see it.
    """

    async def act(exchange: Exchange) -> None:
        exchange.keep_alive = False
        exchange.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await exchange.server.reading_again.wait()
        exchange.writer.transport.resume_reading()  # type: ignore[attr-defined]
        while await exchange.reader.read(1 << 20):
            pass

    return Behaviour(act, before_body=True)


def raw(data: bytes, *, then_reset: bool = False, keep_open: bool = False) -> Behaviour:
    """Send these bytes as they are, then close, reset, or leave the connection open without a word."""

    async def act(exchange: Exchange) -> None:
        exchange.keep_alive = False
        await exchange.send(data)
        if keep_open:
            await exchange.reader.read()
        if then_reset:
            reset_connection(exchange.writer)

    return Behaviour(act)


def reset() -> Behaviour:
    """Reset the connection (RST) instead of answering."""
    return raw(b"", then_reset=True)


def drip(body: bytes, *, first: int) -> Behaviour:
    """Send the head and the first bytes of the body, then stay silent."""
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    return raw(head + body[:first], keep_open=True)


def half_a_body(body: bytes) -> Behaviour:
    """Announce the whole body, send half of it, then close."""
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    return raw(head + body[: len(body) // 2])


def reset_connection(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    raw_socket: socket.socket = writer.get_extra_info("socket")
    raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@dataclass
class ScriptedServer:
    """The server; an async context manager.

    Attributes:
        requests: complete requests, in the order they were complete.
        started: targets whose head arrived, complete or not.
        connections: how many connections were accepted so far.
        open_connections: how many are open now.
        running: requests being treated now; `peak` is the most there were at a time.
        reading_again: lets the behaviour `stop_reading` read what is left.
    """

    tls: ssl.SSLContext | None = None
    requests: list[Request] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    running: int = 0
    peak: int = 0
    reading_again: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answers = itertools.count(1)
        self._scripts: dict[str, list[Behaviour]] = {}
        self._default = answer(404, json={"detail": "no such path in the script"})
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._notifiers: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._notifiers:
            await asyncio.gather(*self._notifiers)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        assert self._server is not None
        return self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def script(self, path: str, *behaviours: Behaviour) -> None:
        """Set what happens to the next requests to this path (without query)."""
        assert behaviours
        self._scripts[path] = list(behaviours)

    def requests_to(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that becomes true through requests or connections coming and going."""
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(condition)

    def _next_behaviour(self, path: str) -> Behaviour:
        script = self._scripts.get(path)
        if script is None:
            return self._default
        return script.pop(0) if len(script) > 1 else script[0]

    def _note(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.create_task(notify())
        self._notifiers.add(task)
        task.add_done_callback(self._notifiers.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        self._note()
        try:
            await self._serve_connection(reader, writer, self.connections)
        except (ConnectionError, asyncio.CancelledError):
            # The test is over, or its client left: both end this connection and nothing else.
            writer.transport.abort()
        finally:
            writer.close()
            self._tasks.discard(task)
            self.open_connections -= 1
            self._note()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        while True:
            head = await _next_event(parser, reader)
            if not isinstance(head, h11.Request):
                return
            exchange = Exchange(self, reader, writer, head)
            self.running += 1
            self.peak = max(self.peak, self.running)
            self.started.append(head.target.decode())
            self._note()
            try:
                await self._treat(exchange, parser, number)
            finally:
                self.running -= 1
            if not exchange.keep_alive or writer.is_closing():
                return
            parser = _fresh(parser)

    async def _treat(self, exchange: Exchange, parser: h11.Connection, number: int) -> None:
        head = exchange.head
        behaviour = self._next_behaviour(urlsplit(head.target.decode()).path)
        if not behaviour.before_body:
            body = bytearray()
            while isinstance(event := await _next_event(parser, exchange.reader), h11.Data):
                body += event.data
            if not isinstance(event, h11.EndOfMessage):
                exchange.keep_alive = False
                return
            headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            exchange.request = Request(head.method.decode(), head.target.decode(), headers, bytes(body), number)
            self.requests.append(exchange.request)
            self._note()
        await behaviour.act(exchange)


async def _next_event(parser: h11.Connection, reader: asyncio.StreamReader) -> object:
    try:
        while (event := parser.next_event()) is h11.NEED_DATA:
            parser.receive_data(await reader.read(1 << 16))
    except h11.RemoteProtocolError:
        return h11.ConnectionClosed()
    return event


def _fresh(parser: h11.Connection) -> h11.Connection:
    """A parser for the next request of the connection, with what has already arrived of it."""
    rest, closed = parser.trailing_data
    fresh = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    if rest:
        fresh.receive_data(rest)
    if closed:
        fresh.receive_data(b"")
    return fresh
