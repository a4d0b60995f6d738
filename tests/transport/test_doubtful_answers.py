"""Answers that are the same to the byte as one before them over the same connection, which a copy of that would be."""

import pytest

from tests.support.scripted_server import Behaviour, Exchange, ScriptedServer, answer
from tinkex_py.transport.http import HttpClient

pytestmark = pytest.mark.asyncio


def same(status: int, body: bytes) -> Behaviour:
    """An answer without a time or an id in it."""

    async def act(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 %d Same\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))

    return Behaviour(act)


async def connections_of(method: str, *behaviours: Behaviour) -> list[int]:
    """The connections over which requests came, for one call per behaviour, which all must be answered."""
    async with ScriptedServer() as server:
        client = HttpClient(base_url=server.url)
        for number, behaviour in enumerate(behaviours):
            server.script(f"/{number}", behaviour)
            await client.exchange(method, f"/{number}")
        await client.aclose()
        return [request.connection for request in server.requests]


@pytest.mark.parametrize("status", [200, 204, 404, 409, 422])
async def test_a_final_answer_is_asked_for_again_over_a_fresh_connection(status: int):
    body = b"" if status == 204 else b"{}"
    assert await connections_of("POST", same(status, body), same(status, body)) == [1, 1, 2]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
async def test_an_answer_that_is_asked_for_again_anyway_is_in_no_doubt(status: int):
    assert await connections_of("POST", same(status, b"{}"), same(status, b"{}")) == [1, 1]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
async def test_its_connection_is_given_up_all_the_same(status: int):
    """If it was a copy, the real answer is still to come, and the next request would get that."""
    assert await connections_of("POST", *[same(status, b"{}")] * 3) == [1, 1, 2]


async def test_what_differs_is_in_no_doubt():
    told = [same(200, b"{}"), same(201, b"{}"), same(200, b"{ }"), answer(200, b"{}"), answer(200, b"{}")]
    long = [same(200, start + bytes(5000)) for start in (b"a", b"b")]
    long += [same(200, bytes(5000) + end) for end in (b"c", b"d")]
    assert await connections_of("GET", *told, *long) == [1] * 9


async def test_a_copy_that_comes_after_other_answers_is_known():
    assert await connections_of("GET", same(200, b"1"), same(200, b"2"), same(200, b"1")) == [1, 1, 1, 2]


async def test_a_delete_is_never_sent_twice():
    """The second would find nothing, though the first was the one that did it."""
    assert await connections_of("DELETE", *[same(200, b"{}")] * 3) == [1, 2, 3]


async def test_what_is_streamed_is_no_copy():
    """It cannot be compared before it is read, so nothing may have come over its connection."""
    async with ScriptedServer() as server:
        client = HttpClient(base_url=server.url)
        server.script("/one", same(200, b"{}"))
        await client.exchange("GET", "/one")
        async with client.stream("/one") as stream:
            assert stream.status == 200
        await client.aclose()
        assert [request.connection for request in server.requests] == [1, 2]
