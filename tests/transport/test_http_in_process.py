"""A service in this process, called through ASGI."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

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


def make_client(app: App, **options: Any) -> KeyedClient:
    return KeyedClient(base_url="http://embedded/prefix", api_key=KEY, asgi_app=app, **options)


@pytest.mark.asyncio
async def test_an_exchange():
    app = App()
    client = make_client(app)
    body = bytes(range(256)) * 20_000
    got = await client.exchange("POST", "/echo", content=body)
    assert (got.status, got.body, got.media_type) == (200, body, "text/plain")
    path, headers, received = app.seen[0]
    assert (path, headers["x-api-key"], received) == ("/prefix/echo", KEY, body)
    await client.aclose()
    with pytest.raises(errors.ClientClosed):
        await client.exchange("GET", "/echo")


@pytest.mark.asyncio
async def test_contextvars_cross_in_neither_direction():
    client = make_client(App())
    MARK.set("set by the caller")
    assert (await client.exchange("GET", "/mark")).body == b"unmarked"
    assert MARK.get() == "set by the caller"
    await client.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/fails", "/times_out"])
async def test_a_failing_service_answers_500(path: str):
    client = make_client(App())
    assert (await client.exchange("GET", path)).status == 500
    await client.aclose()


@pytest.mark.asyncio
async def test_an_answer_that_breaks_off_or_never_comes():
    client = make_client(App())
    with pytest.raises(errors.ConnectionFailed, match="5 of 10 bytes"):
        await client.exchange("GET", "/fails_midway")
    with pytest.raises(errors.InvalidResponse, match="without a response"):
        await client.exchange("GET", "/says_nothing")
    await client.aclose()


@pytest.mark.asyncio
async def test_a_slow_service_times_out():
    app = App()
    client = make_client(app)
    with pytest.raises(errors.TimeoutExceeded, match=r"within 0\.02 s"):
        await client.exchange("GET", "/stalls", timeout=0.02)
    assert app.cancelled.is_set()
    await client.aclose()


@pytest.mark.asyncio
async def test_cancellation_and_closing_reach_the_service():
    app = App()
    client = make_client(app)
    task = asyncio.create_task(client.exchange("GET", "/stalls"))
    await app.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert app.cancelled.is_set()
    app.started.clear()
    task = asyncio.create_task(client.exchange("GET", "/stalls"))
    await app.started.wait()
    await client.aclose()
    with pytest.raises(errors.ClientClosed):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.asyncio
async def test_more_exchanges_than_connections():
    """Nothing is connected in process, so waiting calls never keep another one out."""
    app = App()
    client = make_client(app, max_connections=1)
    waiting = [asyncio.create_task(client.exchange("GET", "/stalls")) for _ in range(30)]
    await app.started.wait()
    assert (await client.exchange("POST", "/echo", content=b"x")).body == b"x"
    await client.aclose()
    await asyncio.gather(*waiting, return_exceptions=True)
