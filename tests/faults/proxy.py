"""An HTTP proxy on loopback, in front of a real service, that spoils what a test tells it to.

    async with FaultProxy(service_url) as proxy:
        proxy.spoil("B", reset_after)
        ...
        assert proxy.injected["reset after", "B"] == 1

A request is known by its *place*: "F" and "B" for the passes of a training step, else the endpoint's name
("optim_step", "retrieve_future", ...). Every place has a line of faults; a request takes the next one, None lets it
through, and so does an empty line. `choose` decides about requests whose line is empty, for random mixes.
"""

import asyncio
import hashlib
import itertools
import json
import socket
import ssl
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import h11
import zstandard

from tinkex_py.transport import wire

PASS_ENDPOINTS = {"forward_backward": "B", "forward": "F"}
PIECE = 1 << 16
_ANSWERS = itertools.count(1)


@dataclass(frozen=True)
class Answer:
    """What a service answers."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @classmethod
    def of(cls, status: int, body: object = None, kind: str = "application/json", **headers: str) -> "Answer":
        """An answer of the proxy's own; `retry_after="1"` becomes the header `retry-after: 1`."""
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        return cls(status, ((b"content-type", kind.encode()), *named), content)

    def encoded(self) -> bytes:
        """Its bytes on the wire; like a real server's, no two answers are the same."""
        told = [(name, value) for name, value in self.headers if name.lower() not in (b"content-length", b"connection")]
        lines = [b"HTTP/1.1 %d Told" % self.status, b"content-length: %d" % len(self.body)]
        lines.append(b"answer: %d" % next(_ANSWERS))
        lines += [name + b": " + value for name, value in told if name.lower() != b"transfer-encoding"]
        return b"\r\n".join([*lines, b"", b""]) + self.body


@dataclass
class Passing:
    """One request on its way through the proxy.

    Attributes:
        place: see the module.
        number: model and seq_id, where it has them.
        passed_on: how often the service got it.
        keep_alive: whether the connection to the client can be used again.
    """

    proxy: "FaultProxy"
    head: h11.Request
    body: bytes
    place: str
    number: tuple[str, int] | None
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    passed_on: int = 0
    keep_alive: bool = True

    async def ask(self) -> Answer:
        """Passes the request on, and gives the service's answer. Ends with the client, if that leaves."""
        self.passed_on += 1
        self.proxy.note_passed_on(self)
        return await self.unless_client_leaves(self.proxy.ask_service(self.head, self.body))

    async def send(self, data: bytes) -> None:
        """Sends bytes to the client."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, answer: Answer) -> None:
        """Sends a whole answer to the client."""
        await self.send(answer.encoded())

    async def close(self) -> None:
        """Nothing more comes: ends the connection to the client."""
        self.keep_alive = False

    async def reset(self) -> None:
        """Breaks the connection to the client (RST)."""
        self.keep_alive = False
        reset_connection(self.writer)

    async def client_leaves(self) -> None:
        """Waits until the client closes the connection."""
        self.keep_alive = False
        while await self.reader.read(PIECE):
            pass
        raise ConnectionResetError("the client left")

    async def unless_client_leaves(self, work: Awaitable[Any]) -> Any:
        """Does something for the client, as long as it listens."""
        doing = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self.reader.read(1))
        try:
            await asyncio.wait([doing, leaving], return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not doing.done():
                assert leaving.result() == b"", "a client sent its next request before the answer"
                raise ConnectionResetError("the client left")
            return await doing
        finally:
            for task in (doing, leaving):
                task.cancel()
            await asyncio.gather(doing, leaving, return_exceptions=True)


@dataclass(frozen=True)
class Fault:
    """Something that happens to a request.

    Attributes:
        name: what the summary calls it.
        act: does it; a fault that answers nothing must break, close or hold the connection.
        answers: whether the client gets the right answer in the end, so that nothing is to be repeated.
    """

    name: str
    act: Callable[[Passing], Awaitable[None]]
    answers: bool = False


def reset_connection(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    raw: socket.socket | None = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@dataclass
class FaultProxy:
    """The proxy; an async context manager.

    Attributes:
        service_url: where requests are passed on to; may be changed at any time.
        tls: speak TLS to clients.
        faults: per place, what happens to the next requests.
        choose: what happens to a request whose line is empty; None lets it through.
        broken_connections: what happens to the next connections before a byte is read; None lets one through.
        injected: how often a fault happened, by name and place.
        requests: how many requests came, by place.
        payloads: per number the digests of the bodies that reached the service.
        in_flight: bytes of pass requests that were begun to be read and are not answered, and `peak` of it.
        most_connections: most connections of clients that were open at once.
        copies: what a connection brings once more, when its next request has come and before that one's answer.
    """

    service_url: str
    tls: ssl.SSLContext | None = None
    faults: dict[str, deque[Fault | None]] = field(default_factory=dict)
    choose: Callable[[Passing], Fault | None] | None = None
    broken_connections: deque[bytes | None] = field(default_factory=deque)
    injected: Counter[tuple[str, str]] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    payloads: dict[tuple[str, int], set[bytes]] = field(default_factory=dict)
    reached: dict[str, list[int]] = field(default_factory=dict)
    in_flight: int = 0
    peak: int = 0
    most_connections: int = 0
    copies: dict[asyncio.StreamWriter, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._listener: socket.socket | None = None
        self._accepted: set[socket.socket] = set()
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Condition()
        self._notifiers: set[asyncio.Task[None]] = set()
        self._answered = 0

    async def __aenter__(self) -> Self:
        self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_listening()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._notifiers:
            await asyncio.gather(*self._notifiers)
        for accepted in self._accepted:
            accepted.close()

    def _listen(self) -> None:
        # Not asyncio's own server: one that is closed in the moment of a connection leaves that connection open.
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=100)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, ConnectionError):  # the client has left already
            return
        self._accepted.add(accepted)
        self._start(self._connect(accepted))

    async def _connect(self, accepted: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=1 << 20)
        protocol = asyncio.StreamReaderProtocol(reader, self._serve)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, accepted)
        self._accepted.discard(accepted)

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def open_connections(self) -> int:
        """Connections of clients that are open."""
        return len(self._writers)

    # What a test says

    def spoil(self, place: str, *faults: Fault | None) -> None:
        """The next requests of a place; None lets one through."""
        self.faults.setdefault(place, deque()).extend(faults)

    def heal(self) -> None:
        """No more faults."""
        self.faults.clear()
        self.choose = None
        self.broken_connections.clear()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that becomes true through requests and answers."""
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(condition)

    def stop_listening(self) -> None:
        """Refuses connections from now on; those that are open stay so."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def refuse_for(self, seconds: float) -> None:
        """Refuses connections for a while, and breaks those that are open."""
        self.stop_listening()
        for writer in list(self._writers):
            reset_connection(writer)
        self._start(self._listen_again(seconds))

    async def _listen_again(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._listener is None:  # two refusals may overlap
            self._listen()

    def check_numbers(self, model_id: str) -> None:
        """The service got a model's numbers as 1..n, and none with two payloads."""
        numbers = self.reached.get(model_id, [])
        assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1)), f"a gap: {numbers}"
        for number in numbers:
            assert len(self.payloads[model_id, number]) == 1, f"{number} came with two payloads"

    # Passing on

    def note_passed_on(self, passing: Passing) -> None:
        """Remembers what reaches the service."""
        if passing.number is not None:
            self.reached.setdefault(passing.number[0], []).append(passing.number[1])
            digest = hashlib.sha256(passing.body).digest()
            self.payloads.setdefault(passing.number, set()).add(digest)

    async def another_answer(self, at_most: float) -> None:
        """Waits until another request was answered; not for ever, since there may be none."""
        before = self._answered
        try:
            async with asyncio.timeout(at_most), self._changed:
                await self._changed.wait_for(lambda: self._answered != before)
        except TimeoutError:
            return

    async def ask_service(self, head: h11.Request, body: bytes) -> Answer:
        """One request to the service, over a connection of its own."""
        address = urlsplit(self.service_url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            parser = h11.Connection(h11.CLIENT)
            dropped = (b"connection", b"host")
            headers = [(name, value) for name, value in head.headers if name not in dropped]
            headers += [(b"host", address.netloc.encode()), (b"connection", b"close")]
            request = h11.Request(method=head.method, target=head.target, headers=headers)
            writer.write(b"".join(filter(None, (parser.send(request), parser.send(h11.Data(body))))))
            writer.write(parser.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            response: h11.Response | None = None
            received = bytearray()
            while not isinstance(event := await next_event(parser, reader), h11.EndOfMessage):
                if isinstance(event, h11.Response):
                    response = event
                elif isinstance(event, h11.Data):
                    received += event.data
                elif not isinstance(event, h11.InformationalResponse):
                    raise ConnectionResetError("the service left")
            assert response is not None
            return Answer(response.status_code, tuple(response.headers), bytes(received))
        finally:
            writer.close()

    # Serving

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
        self._writers.add(writer)
        self.most_connections = max(self.most_connections, len(self._writers))
        try:
            await self._serve_connection(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            # The client or the service left, or the test is over: each ends this connection and nothing else.
            writer.transport.abort()
        finally:
            writer.close()
            self._writers.discard(writer)
            self.copies.pop(writer, None)
            self._tasks.discard(task)
            self._note()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broken = self.broken_connections.popleft() if self.broken_connections else None
        if broken is not None:
            self.injected["connection broken at its start", "any"] += 1
            writer.write(broken)
            await writer.drain()
            return
        if self.tls is not None:
            await writer.start_tls(self.tls)
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        while isinstance(head := await next_event(parser, reader), h11.Request):
            if not await self._serve_request(parser, head, reader, writer):
                return
            parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)

    async def _serve_request(
        self,
        parser: h11.Connection,
        head: h11.Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        length = int(dict(head.headers).get(b"content-length", b"0"))
        endpoint = urlsplit(head.target.decode()).path.rsplit("/", 1)[-1]
        counted = length if endpoint in PASS_ENDPOINTS else 0
        self.in_flight += counted
        self.peak = max(self.peak, self.in_flight)
        try:
            body = bytearray()
            while isinstance(event := await next_event(parser, reader), h11.Data):
                body += event.data
            if not isinstance(event, h11.EndOfMessage):
                return False
            passing = make_passing(self, head, bytes(body), reader, writer)
            copy = self.copies.pop(writer, None)
            if copy is not None:
                self.injected["copy of the answer before", passing.place] += 1
                await passing.send(copy)
            await self._treat(passing)
        finally:
            self.in_flight -= counted
        self._answered += 1
        self._note()
        return passing.keep_alive and not writer.is_closing()

    async def _treat(self, passing: Passing) -> None:
        self.requests[passing.place] += 1
        self._note()
        line = self.faults.get(passing.place)
        fault = line.popleft() if line else (self.choose(passing) if self.choose else None)
        if fault is None:
            await passing.answer(await passing.ask())
            return
        self.injected[fault.name, passing.place] += 1
        await fault.act(passing)


def make_passing(
    proxy: FaultProxy, head: h11.Request, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Passing:
    """Finds out what a request is."""
    endpoint = urlsplit(head.target.decode()).path.rsplit("/", 1)[-1]
    headers = dict(head.headers)
    if endpoint in PASS_ENDPOINTS and headers.get(b"content-type") == b"application/x-protobuf":
        packed = headers.get(b"content-encoding") == b"zstd"
        content = zstandard.ZstdDecompressor().decompress(body) if packed else body
        message = wire.ForwardBackwardRequest.FromString(content)
        place, number = ("F" if message.forward_only else "B"), (message.model_id, message.seq_id)
        return Passing(proxy, head, body, place, number, reader, writer)
    fields: Any = json.loads(body) if body.startswith(b"{") else {}
    number = (fields["model_id"], fields["seq_id"]) if "seq_id" in fields and "model_id" in fields else None
    return Passing(proxy, head, body, PASS_ENDPOINTS.get(endpoint, endpoint), number, reader, writer)


async def next_event(parser: h11.Connection, reader: asyncio.StreamReader) -> object:
    """The next event of a connection; ConnectionClosed where it makes no sense."""
    try:
        while (event := parser.next_event()) is h11.NEED_DATA:
            parser.receive_data(await reader.read(PIECE))
    except h11.RemoteProtocolError:
        return h11.ConnectionClosed()
    return event
