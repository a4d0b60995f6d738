"""A real HTTP/1.1 server on loopback whose responses, delays and failures a test scripts.

    async with ScriptedServer() as server:
        server.script("/api/v1/thing", answer(503), answer(json={"ok": True}))
        ...
        await server.until(lambda: len(server.requests_to("/api/v1/thing")) == 2)

Each request to a path takes the next behaviour of its script; the last one repeats.
"""

import asyncio
import itertools
import json as json_module
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

from tests.support.loopback import LoopbackServer, new_parser, next_event, read_body, reset_connection


@dataclass(frozen=True)
class Request:
    """A request as it arrived; header names are in lower case."""

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
    """The request and connection of a behaviour. `request` is None if it runs before the body is read."""

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
        # Real servers send a date, so no two responses are equal to the byte.
        lines = [f"HTTP/1.1 {status} Scripted", f"content-length: {len(body)}", f"answer: {next(self.server.answers)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        payload = b"" if self.head.method == b"HEAD" else body
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + payload)


@dataclass(frozen=True)
class Behaviour:
    """How one request is handled."""

    act: Callable[[Exchange], Awaitable[None]]
    before_body: bool = False


def answer(
    status: int = 200, body: bytes = b"", *, json: object | None = None, headers: Mapping[str, str] | None = None
) -> Behaviour:
    """Sends a response at once."""
    payload = body if json is None else json_module.dumps(json).encode()
    kind = "application/octet-stream" if json is None else "application/json"
    sent = {"content-type": kind, **(headers or {})}

    async def act(exchange: Exchange) -> None:
        await exchange.send_answer(status, sent, payload)

    return Behaviour(act)


def computed(make: Callable[[Request], Behaviour]) -> Behaviour:
    """Chooses the behaviour from the request."""

    async def act(exchange: Exchange) -> None:
        assert exchange.request is not None
        await make(exchange.request).act(exchange)

    return Behaviour(act)


def held(release: asyncio.Event, then: Behaviour) -> Behaviour:
    """Waits for an event, then continues with another behaviour."""

    async def act(exchange: Exchange) -> None:
        await release.wait()
        await then.act(exchange)

    return Behaviour(act)


def stall() -> Behaviour:
    """Never responds; ends when the client closes the connection."""

    async def act(exchange: Exchange) -> None:
        exchange.keep_alive = False
        await exchange.reader.read()

    return Behaviour(act)


def stop_reading() -> Behaviour:
    """Does not read the body, so that a client with a large one blocks while it sends.

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
    """Sends these bytes, then closes or resets the connection, or leaves it open in silence."""

    async def act(exchange: Exchange) -> None:
        exchange.keep_alive = False
        await exchange.send(data)
        if keep_open:
            await exchange.reader.read()
        if then_reset:
            reset_connection(exchange.writer)

    return Behaviour(act)


def reset() -> Behaviour:
    """Resets the connection (RST) instead of responding."""
    return raw(b"", then_reset=True)


def drip(body: bytes, *, first: int) -> Behaviour:
    """Sends the head and the first bytes of the body, then nothing more."""
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    return raw(head + body[:first], keep_open=True)


def half_a_body(body: bytes) -> Behaviour:
    """Announces the whole body, sends half of it, then closes."""
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    return raw(head + body[: len(body) // 2])


class ScriptedServer(LoopbackServer):
    """The server; an async context manager.

    Attributes:
        requests: complete requests, in the order they were complete.
        started: targets whose head arrived, complete or not.
        running: requests being served now; `peak` is the maximum so far.
        reading_again: lets the behaviour `stop_reading` read what is left.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls)
        self.requests: list[Request] = []
        self.started: list[str] = []
        self.running = 0
        self.peak = 0
        self.reading_again = asyncio.Event()
        self.answers = itertools.count(1)
        self._scripts: dict[str, list[Behaviour]] = {}
        self._default = answer(404, json={"detail": "no such path in the script"})

    def script(self, path: str, *behaviours: Behaviour) -> None:
        """Sets what happens to the next requests to this path (without query)."""
        assert behaviours
        self._scripts[path] = list(behaviours)

    def requests_to(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if self.tls is not None:
            await writer.start_tls(self.tls)
        parser = new_parser()
        while isinstance(head := await next_event(parser, reader), h11.Request):
            exchange = Exchange(self, reader, writer, head)
            self.running += 1
            self.peak = max(self.peak, self.running)
            self.started.append(head.target.decode())
            self.changed()
            try:
                await self._serve_request(exchange, parser, number)
            finally:
                self.running -= 1
            if not exchange.keep_alive or writer.is_closing():
                return
            parser = new_parser(parser)

    async def _serve_request(self, exchange: Exchange, parser: h11.Connection, number: int) -> None:
        head = exchange.head
        behaviour = self._next_behaviour(urlsplit(head.target.decode()).path)
        if not behaviour.before_body:
            body = await read_body(parser, exchange.reader)
            if body is None:
                exchange.keep_alive = False
                return
            headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            exchange.request = Request(head.method.decode(), head.target.decode(), headers, body, number)
            self.requests.append(exchange.request)
            self.changed()
        await behaviour.act(exchange)

    def _next_behaviour(self, path: str) -> Behaviour:
        script = self._scripts.get(path)
        if script is None:
            return self._default
        return script.pop(0) if len(script) > 1 else script[0]
