"""An HTTP proxy on loopback, in front of a real service, that injects the faults of a test.

    async with FaultProxy(service_url) as proxy:
        proxy.spoil("B", reset_after)
        ...
        assert proxy.injected["reset after", "B"] == 1

A request is known by its *place*: "F" and "B" for the passes of a training step, else the endpoint's name
("optim_step", "retrieve_future", ...). Every place has a queue of faults; a request takes the next one, None forwards
it, and so does an empty queue. `choose` decides about requests whose queue is empty, for random mixes.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import ssl
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
import zstandard

from tests.support.loopback import PIECE, LoopbackServer, new_parser, next_event, read_body, reset_connection
from tinkex_py.transport import wire

PASS_ENDPOINTS = {"forward_backward": "B", "forward": "F"}
_OF_THE_CONNECTION = (b"content-length", b"connection", b"transfer-encoding")
_ANSWERS = itertools.count(1)


@dataclass(frozen=True)
class Answer:
    """A response of a service."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @classmethod
    def of(cls, status: int, body: object = None, kind: str = "application/json", **headers: str) -> "Answer":
        """Returns a response of the proxy itself; `retry_after="1"` becomes the header `retry-after: 1`."""
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        return cls(status, ((b"content-type", kind.encode()), *named), content)

    def encoded(self) -> bytes:
        """Returns its bytes on the wire; like those of a real server, no two responses are equal."""
        lines = [b"HTTP/1.1 %d Forwarded" % self.status, b"content-length: %d" % len(self.body)]
        lines.append(b"answer: %d" % next(_ANSWERS))
        lines += [name + b": " + value for name, value in self.headers if name.lower() not in _OF_THE_CONNECTION]
        return b"\r\n".join([*lines, b"", b""]) + self.body


@dataclass
class Passing:
    """One request on its way through the proxy.

    Attributes:
        place: see the module.
        number: model and seq_id, if it has them.
        keep_alive: whether the connection to the client can be used again.
    """

    proxy: "FaultProxy"
    head: h11.Request
    body: bytes
    place: str
    number: tuple[str, int] | None
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    keep_alive: bool = True

    async def ask(self) -> Answer:
        """Forwards the request and returns the response of the service. Ends if the client leaves."""
        self.proxy.note_forwarded(self)
        return await self.unless_client_leaves(self.proxy.ask_service(self.head, self.body))

    async def send(self, data: bytes) -> None:
        """Sends bytes to the client."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, answer: Answer) -> None:
        """Sends a complete response to the client."""
        await self.send(answer.encoded())

    async def close(self) -> None:
        """Ends the connection to the client."""
        self.keep_alive = False

    async def reset(self) -> None:
        """Resets the connection to the client (RST)."""
        self.keep_alive = False
        reset_connection(self.writer)

    async def client_leaves(self) -> None:
        """Waits until the client closes the connection."""
        self.keep_alive = False
        while await self.reader.read(PIECE):
            pass
        raise ConnectionResetError("the client left")

    async def unless_client_leaves(self, work: Awaitable[Any]) -> Any:
        """Awaits some work, which ends if the client leaves."""
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
        name: its name in the summary.
        act: does it; a fault without a response must reset, close or hold the connection.
        answers: whether the client gets the correct response in the end, so that it repeats nothing.
    """

    name: str
    act: Callable[[Passing], Awaitable[None]]
    answers: bool = False


class FaultProxy(LoopbackServer):
    """The proxy; an async context manager.

    Attributes:
        service_url: where requests are forwarded; may change at any time.
        faults: for each place, the faults of its next requests.
        choose: chooses the fault of a request without one in `faults`; None forwards it.
        broken_connections: bytes that the next connections get instead of service; None serves one.
        injected: how often each fault happened, by name and place.
        requests: how many requests arrived, by place.
        payloads: digests of the bodies that reached the service, by model and number.
        reached: the numbers that reached the service, by model.
        most_connections: the highest number of open client connections so far.
    """

    def __init__(self, service_url: str, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls)
        self.service_url = service_url
        self.faults: dict[str, deque[Fault | None]] = {}
        self.choose: Callable[[Passing], Fault | None] | None = None
        self.broken_connections: deque[bytes] = deque()
        self.injected: Counter[tuple[str, str]] = Counter()
        self.requests: Counter[str] = Counter()
        self.payloads: dict[tuple[str, int], set[bytes]] = {}
        self.reached: dict[str, list[int]] = {}
        self.most_connections = 0
        self._answered = 0

    def spoil(self, place: str, *faults: Fault | None) -> None:
        """Sets the faults of the next requests of a place; None forwards one."""
        self.faults.setdefault(place, deque()).extend(faults)

    def heal(self) -> None:
        """Removes all faults that have not happened yet."""
        self.faults.clear()
        self.choose = None
        self.broken_connections.clear()

    async def refuse_for(self, seconds: float) -> None:
        """Refuses connections for some seconds, and resets the open ones."""
        self.stop_listening()
        for writer in list(self.writers):
            reset_connection(writer)
        self.start(self._listen_again(seconds))

    async def _listen_again(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if not self.is_listening:  # two refusals may overlap
            self.listen()

    def check_numbers(self, model_id: str) -> None:
        """Checks that the service got the numbers 1..n of a model, and none with two payloads."""
        numbers = self.reached.get(model_id, [])
        assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1)), f"a gap: {numbers}"
        for number in numbers:
            assert len(self.payloads[model_id, number]) == 1, f"{number} came with two payloads"

    # Forwarding

    def note_forwarded(self, passing: Passing) -> None:
        """Records what reaches the service."""
        if passing.number is not None:
            self.reached.setdefault(passing.number[0], []).append(passing.number[1])
            self.payloads.setdefault(passing.number, set()).add(hashlib.sha256(passing.body).digest())

    async def another_answer(self, at_most: float) -> None:
        """Waits until another request is answered, for some seconds at most: there may be none."""
        before = self._answered
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await self.until(lambda: self._answered != before)

    async def ask_service(self, head: h11.Request, body: bytes) -> Answer:
        """Sends one request to the service, over its own connection."""
        address = urlsplit(self.service_url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            parser = h11.Connection(h11.CLIENT)
            headers = [(name, value) for name, value in head.headers if name not in (b"connection", b"host")]
            headers += [(b"host", address.netloc.encode()), (b"connection", b"close")]
            request = h11.Request(method=head.method, target=head.target, headers=headers)
            for event in (request, h11.Data(body), h11.EndOfMessage()):
                writer.write(parser.send(event) or b"")
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

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.most_connections = max(self.most_connections, self.open_connections)
        if self.broken_connections:
            self.injected["connection broken at its start", "any"] += 1
            writer.write(self.broken_connections.popleft())
            await writer.drain()
            return
        if self.tls is not None:
            await writer.start_tls(self.tls)
        parser = new_parser()
        while isinstance(head := await next_event(parser, reader), h11.Request):
            body = await read_body(parser, reader)
            if body is None:
                return
            passing = make_passing(self, head, body, reader, writer)
            await self._serve_request(passing)
            self._answered += 1
            self.changed()
            if not passing.keep_alive or writer.is_closing():
                return
            parser = new_parser()

    async def _serve_request(self, passing: Passing) -> None:
        self.requests[passing.place] += 1
        self.changed()
        queue = self.faults.get(passing.place)
        fault = queue.popleft() if queue else (self.choose(passing) if self.choose else None)
        if fault is None:
            await passing.answer(await passing.ask())
            return
        self.injected[fault.name, passing.place] += 1
        await fault.act(passing)


def make_passing(
    proxy: FaultProxy, head: h11.Request, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Passing:
    """Finds out the place and the number of a request."""
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
