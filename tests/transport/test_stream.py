"""Responses read piece by piece, against a real server on loopback."""

import asyncio
import gzip
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.support.scripted_server import ScriptedServer, answer, drip, half_a_body, reset, stall
from tests.transport.keyed import KeyedClient
from tinkex_py.errors import ClientClosed, ConfigError, ConnectionFailed, TimeoutExceeded
from tinkex_py.transport.messages import Secret, request

pytestmark = pytest.mark.asyncio
BODY = bytes(range(256)) * 4000
KEY = "tml-secret"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as running:
        yield running


@pytest_asyncio.fixture
async def client(server: ScriptedServer) -> AsyncIterator[KeyedClient]:
    # A timeout beyond that of the tests: nothing may depend on it.
    made = KeyedClient(base_url=server.url, api_key=KEY, timeout=600.0, max_connections=2, headers={"X-Mine": "1"})
    yield made
    await made.aclose()


async def read(client: KeyedClient, **options: object) -> bytes:
    async with client.stream("/file", **options) as stream:  # type: ignore[arg-type]
        return b"".join([piece async for piece in stream.pieces()])


async def test_the_body_arrives_in_pieces(server, client):
    server.script("/file", answer(206, BODY, headers={"ETag": "x"}))
    async with client.stream("/file", headers={"Range": "bytes=0-", "Accept-Encoding": "identity"}) as stream:
        assert (stream.status, stream.headers["etag"], stream.length, stream.received) == (206, "x", len(BODY), 0)
        pieces = [piece async for piece in stream.pieces()]
        assert stream.received == len(BODY)
    assert len(pieces) > 1
    assert b"".join(pieces) == BODY
    (request,) = server.requests
    assert request.headers["range"] == "bytes=0-"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["x-api-key"] == KEY


async def test_a_compressed_answer_stays_compressed(server, client):
    """Storages that mark a .tar.gz as compressed give the same bytes, and the same ranges, as others."""
    packed = gzip.compress(BODY)
    server.script("/file", answer(200, packed, headers={"Content-Encoding": "gzip"}))
    async with client.stream("/file") as stream:
        assert stream.length == len(packed)
        assert b"".join([piece async for piece in stream.pieces()]) == packed


async def test_errors_are_read_up_to_a_bound(server, client):
    server.script("/file", answer(500, BODY))
    async with client.stream("/file") as stream:
        whole = await stream.beginning()
    assert (whole.status, whole.body) == (500, BODY[: 1 << 16])
    server.script("/file", answer(404, json={"detail": "no"}))
    async with client.stream("/file") as stream:
        assert (await stream.beginning()).json() == {"detail": "no"}


async def test_redirections_are_not_followed(server, client):
    server.script("/file", answer(302, headers={"Location": "/other"}))
    async with client.stream("/file") as stream:
        assert (stream.status, stream.headers["location"]) == (302, "/other")
    assert len(server.requests) == 1


@pytest.mark.parametrize("behaviour", [half_a_body(BODY), reset()], ids=["half", "reset"])
async def test_a_body_that_breaks_off_is_an_error(server, client, behaviour):
    server.script("/file", behaviour, answer(200, BODY))
    with pytest.raises(ConnectionFailed):
        await read(client)
    assert await read(client) == BODY


@pytest.mark.parametrize("behaviour", [stall(), drip(BODY, first=100)], ids=["no answer", "no more"])
async def test_a_stalled_response_is_an_error(server, client, behaviour):
    server.script("/file", behaviour, answer(200, BODY))
    with pytest.raises(TimeoutExceeded):
        await read(client, timeout=0.1)
    assert await read(client) == BODY


async def test_leaving_early_closes_what_is_half_read(server, client):
    server.script("/file", drip(BODY, first=1000), answer(200, BODY))
    async with client.stream("/file") as stream:
        async for _ in stream.pieces():
            break
    await server.until(lambda: server.open_connections == 0)
    assert await read(client) == BODY


async def test_closing_the_client_ends_a_stream_and_those_elsewhere(server, client):
    server.script("/file", drip(BODY, first=1000))

    async def elsewhere() -> None:
        async with (
            client.http.towards(Secret(f"{server.url}/file"), key=client.key) as (other, path, key),
            other.stream(request("GET", path.reveal()), key=key) as stream,
        ):
            async for _ in stream.pieces():
                pass

    tasks = [asyncio.create_task(read(client)), asyncio.create_task(elsewhere())]
    await server.until(lambda: len(server.requests) == 2)
    await client.aclose()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, ClientClosed)
    await server.until(lambda: server.open_connections == 0)
    with pytest.raises(ClientClosed):
        async with client.http.towards(Secret(server.url)):
            pass


async def test_a_timeout_of_the_caller_is_not_translated(server, client):
    server.script("/file", answer(200, BODY))
    with pytest.raises(TimeoutError, match="mine") as caught:
        async with client.stream("/file"):
            raise TimeoutError("mine")
    assert type(caught.value) is TimeoutError


async def test_a_storm_of_cancelled_streams_leaves_the_client_working(server, client):
    server.script("/file", drip(BODY, first=1000))
    for _ in range(20):
        tasks = [asyncio.create_task(read(client)) for _ in range(10)]
        seen = len(server.started)
        await server.until(lambda: len(server.started) > seen)  # noqa: B023
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    server.script("/file", answer(200, BODY))
    async with asyncio.timeout(20):
        assert await read(client) == BODY


async def test_another_place_gets_neither_key_nor_headers(server, client):
    server.script("/file", answer(200, BODY))
    async with ScriptedServer() as other:
        other.script("/file", answer(200, BODY))
        for place, secret in ((server, KEY), (other, None)):
            async with (
                client.http.towards(Secret(f"{place.url}/file?a=b"), key=client.key) as (there, path, key),
                there.stream(request("GET", path.reveal()), key=key) as stream,
            ):
                assert stream.status == 200
            (arrived,) = place.requests
            assert arrived.target == "/file?a=b"
            assert arrived.headers.get("x-api-key") == secret
            assert arrived.headers.get("x-mine") == ("1" if secret else None)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/path", "", "http://", "ftp://host/x", "http://u:p@host/x"])
async def test_an_invalid_url_is_refused(client, url):
    with pytest.raises(ConfigError):
        async with client.http.towards(Secret(url)):
            pass


async def test_a_service_in_this_process():
    async def file(_request: object) -> PlainTextResponse:
        return PlainTextResponse(BODY)

    made = KeyedClient(base_url="http://inside", api_key=None, asgi_app=Starlette(routes=[Route("/file", file)]))
    assert await read(made) == BODY
    async with (
        made.http.towards(Secret("http://inside/file")) as (there, path, key),
        there.stream(request("GET", path.reveal()), key=key) as stream,
    ):
        assert b"".join([piece async for piece in stream.pieces()]) == BODY
    await made.aclose()
