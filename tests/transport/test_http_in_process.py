"""Calls a service in this process through ASGI."""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from tests.transport.keyed import KeyedClient
from tinkex_py import errors

KEY = "tml-very-secret-key"

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

MARK: contextvars.ContextVar[str] = contextvars.ContextVar("MARK", default="unmarked")


class App:
    """A small ASGI service; each path behaves as its method says."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append((scope["path"], headers, body))
        self.started.set()
        await getattr(self, scope["path"].rsplit("/", 1)[1])(send, body)

    async def echo(self, send: Send, body: bytes) -> None:
        await respond(send, 200, body)

    async def mark(self, send: Send, body: bytes) -> None:
        before = MARK.get()
        MARK.set("set by the service")
        await respond(send, 200, before.encode())

    async def fails(self, send: Send, body: bytes) -> None:
        raise ZeroDivisionError("PROMPT")

    async def fails_midway(self, send: Send, body: bytes) -> None:
        headers = [(b"content-length", b"10")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"12345", "more_body": True})
        raise ZeroDivisionError

    async def says_nothing(self, send: Send, body: bytes) -> None:
        return

    async def times_out(self, send: Send, body: bytes) -> None:
        raise TimeoutError

    async def stalls(self, send: Send, body: bytes) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


async def respond(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def app() -> App:
    return App()


@pytest_asyncio.fixture
async def client(app: App) -> AsyncIterator[KeyedClient]:
    made = KeyedClient(base_url="http://embedded/prefix", api_key=KEY, asgi_app=app, max_connections=1)
    yield made
    await made.aclose()


@pytest.mark.asyncio
async def test_an_exchange(app: App, client: KeyedClient):
    body = bytes(range(256)) * 20_000
    response = await client.exchange("POST", "/echo", content=body)
    assert (response.status, response.body, response.media_type) == (200, body, "text/plain")
    path, headers, received = app.seen[0]
    assert (path, headers["x-api-key"], received) == ("/prefix/echo", KEY, body)


@pytest.mark.asyncio
async def test_contextvars_cross_in_neither_direction(client: KeyedClient):
    MARK.set("set by the caller")
    assert (await client.exchange("GET", "/mark")).body == b"unmarked"
    assert MARK.get() == "set by the caller"


@pytest.mark.asyncio
async def test_failures_of_the_service(app: App, client: KeyedClient):
    for path in ("/fails", "/times_out"):
        assert (await client.exchange("GET", path)).status == 500
    with pytest.raises(errors.ConnectionFailed, match="5 of 10 bytes"):
        await client.exchange("GET", "/fails_midway")
    with pytest.raises(errors.InvalidResponse, match="without a response"):
        await client.exchange("GET", "/says_nothing")
    with pytest.raises(errors.TimeoutExceeded, match=r"within 0\.02 s"):
        await client.exchange("GET", "/stalls", timeout=0.02)
    assert app.cancelled.is_set()


@pytest.mark.asyncio
async def test_cancellation_and_closing_reach_the_service(app: App, client: KeyedClient):
    """Nothing is connected, so exchanges never wait for each other, whatever `max_connections` is."""
    cancelled = asyncio.create_task(client.exchange("GET", "/stalls"))
    await app.started.wait()
    assert (await client.exchange("POST", "/echo", content=b"x")).body == b"x"
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert app.cancelled.is_set()
    app.started.clear()
    closed = asyncio.create_task(client.exchange("GET", "/stalls"))
    await app.started.wait()
    await client.aclose()
    for exchange in (closed, client.exchange("GET", "/echo")):
        with pytest.raises(errors.ClientClosed):
            await exchange
    assert asyncio.all_tasks() == {asyncio.current_task()}
