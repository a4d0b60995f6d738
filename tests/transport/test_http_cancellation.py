"""Cancelled, broken and closed exchanges leave the client working and nothing behind."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.scripted_server import (
    Behaviour,
    Exchange,
    Request,
    ScriptedServer,
    answer,
    computed,
    drip,
    held,
    reset,
    stall,
    stop_reading,
)
from tests.transport.keyed import KeyedClient
from tinkex_py import RetryPolicy, errors, telemetry
from tinkex_py.telemetry import Event
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.auth import Auth
from tinkex_py.transport.http import HttpClient
from tinkex_py.transport.messages import Secret, request as new_request

KEY = "tml-very-secret-key"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as running:
        running.script("/good", answer(json=1))
        running.script("/stall", stall())
        yield running


@pytest_asyncio.fixture
async def client(server: ScriptedServer) -> AsyncIterator[KeyedClient]:
    made = KeyedClient(base_url=server.url, api_key=KEY, max_connections=4)
    yield made
    await made.aclose()
    await server.until(lambda: server.open_connections == 0)


async def cancel_all(tasks: list[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.cancelled() for task in tasks)


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def require_every_slot_works(client: KeyedClient, server: ScriptedServer, slots: int) -> None:
    """All slots at once, so that a single lost one would hang."""
    release = asyncio.Event()
    server.script("/together", held(release, answer(json=1)))
    before = len(server.requests_to("/together"))
    async with asyncio.timeout(30):
        tasks = [asyncio.create_task(client.exchange("GET", "/together")) for _ in range(slots)]
        await server.until(lambda: len(server.requests_to("/together")) == before + slots)
        release.set()
        answers = await asyncio.gather(*tasks)
    assert [got.json() for got in answers] == [1] * slots


@pytest.mark.asyncio
async def test_fifty_rounds_of_twenty_cancelled_requests(server: ScriptedServer, client: KeyedClient):
    for round_number in range(50):
        tasks = [asyncio.create_task(client.exchange("GET", "/stall")) for _ in range(20)]
        await ticks(round_number % 25)
        await cancel_all(tasks)
    await require_every_slot_works(client, server, 4)
    await server.until(lambda: server.open_connections <= 4)


@pytest.mark.asyncio
async def test_fifty_rounds_with_requests_that_arrived(server: ScriptedServer, client: KeyedClient):
    for round_number in range(50):
        tasks = [asyncio.create_task(client.exchange("POST", "/stall", content=b"x" * 100)) for _ in range(20)]
        await server.until(lambda number=round_number: len(server.requests_to("/stall")) == 4 * (number + 1))
        await cancel_all(tasks)
    await require_every_slot_works(client, server, 4)
    assert server.peak <= 8  # the cancelled ones may be closing while their successors are served


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/large", "/drip", "/reset", "/stuck"])
async def test_cancelled_after_every_number_of_loop_steps(server: ScriptedServer, path: str):
    server.script("/large", answer(200, bytes(600 << 10)))
    server.script("/drip", drip(b"x" * 1000, first=10))
    server.script("/reset", reset())
    server.script("/stuck", stop_reading())
    content = bytes(6 << 20) if path == "/stuck" else bytes(300 << 10)
    client = KeyedClient(base_url=server.url, api_key=KEY, max_connections=1)
    for steps in range(60):
        task = asyncio.create_task(client.exchange("POST", path, content=content))
        await ticks(steps)
        complete = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() or isinstance(task.exception(), errors.ConnectionFailed) or task.result().status == 200
        async with asyncio.timeout(30):
            assert (await client.exchange("GET", "/good")).json() == 1
        if complete:
            break
    await client.aclose()
    server.reading_again.set()
    await server.until(lambda: server.open_connections == 0)


@pytest.mark.asyncio
async def test_cancelled_twice(server: ScriptedServer, client: KeyedClient):
    for steps in range(12):
        tasks = [asyncio.create_task(client.exchange("GET", "/stall")) for _ in range(6)]
        await server.until(lambda: server.running >= 4)
        for task in tasks:
            task.cancel()
        await ticks(steps % 4)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.until(lambda: server.running == 0)
    await require_every_slot_works(client, server, 4)


@pytest.mark.asyncio
async def test_a_cancellation_is_an_exception_event(server: ScriptedServer, client: KeyedClient):
    seen: list[Event] = []
    handler_id = telemetry.attach(seen.append, events="tinkex.http.request.*")
    try:
        task = asyncio.create_task(client.exchange("GET", "/stall"))
        await server.until(lambda: len(server.requests) == 1)
        await cancel_all([task])
    finally:
        telemetry.detach(handler_id)
    assert [event.name.rsplit(".", 1)[1] for event in seen] == ["start", "exception"]
    assert seen[1].metadata["reason"] == "CancelledError"


@pytest.mark.asyncio
async def test_waiting_is_in_order_and_a_cancelled_waiter_is_skipped(server: ScriptedServer):
    release = asyncio.Event()
    server.script("/one", held(release, answer()))
    client = KeyedClient(base_url=server.url, api_key=KEY, max_connections=1)
    tasks = [asyncio.create_task(client.exchange("GET", f"/one?{number}")) for number in range(6)]
    await server.until(lambda: len(server.requests) == 1)
    tasks[1].cancel()
    tasks[3].cancel()
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [request.target for request in server.requests] == ["/one?0", "/one?2", "/one?4", "/one?5"]
    await client.aclose()


@pytest.mark.asyncio
async def test_two_hundred_exchanges_over_eight_connections(server: ScriptedServer):
    client = KeyedClient(base_url=server.url, api_key=KEY, max_connections=8)
    answers = await asyncio.gather(*(client.exchange("GET", f"/good?{number}") for number in range(200)))
    assert [got.json() for got in answers] == [1] * 200
    assert {request.target for request in server.requests} == {f"/good?{number}" for number in range(200)}
    assert server.connections <= 8
    assert server.peak <= 8
    await client.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(4))
async def test_random_trouble(server: ScriptedServer, seed: int):
    dice = random.Random(seed)
    server.script("/reset", reset())
    server.script("/drip", drip(b"x" * 100, first=50))
    client = KeyedClient(base_url=server.url, api_key=KEY, max_connections=3)
    paths = ["/good", "/good", "/stall", "/reset", "/drip"]
    tasks = [asyncio.create_task(client.exchange("GET", dice.choice(paths))) for _ in range(80)]
    while not all(task.done() for task in tasks):
        await ticks(dice.randrange(20))
        dice.choice(tasks).cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        expected = isinstance(outcome, asyncio.CancelledError | errors.ConnectionFailed)
        assert expected or outcome.status == 200  # type: ignore[union-attr]
    await require_every_slot_works(client, server, 3)
    await client.aclose()
    await server.until(lambda: server.open_connections == 0)


@pytest.mark.asyncio
async def test_an_idle_connection_that_the_server_closed_is_replaced(server: ScriptedServer, client: KeyedClient):
    server.script("/bye", answer(headers={"connection": "close"}))
    for _ in range(5):
        assert (await client.exchange("GET", "/bye")).status == 200
        assert (await client.exchange("GET", "/good")).status == 200


# Closing


@pytest.mark.asyncio
async def test_closing_stops_what_runs_and_what_waits(server: ScriptedServer):
    client = KeyedClient(base_url=server.url, api_key=KEY, max_connections=2)
    threads = set(threading.enumerate())
    tasks = [asyncio.create_task(client.exchange("GET", "/stall")) for _ in range(5)]
    await server.until(lambda: len(server.requests) == 2)
    await asyncio.gather(client.aclose(), client.aclose())
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.ClientClosed] * 5
    await client.aclose()
    with pytest.raises(errors.ClientClosed, match="closed; create a new one"):
        await client.exchange("GET", "/good")
    await server.until(lambda: server.open_connections == 0)
    assert set(threading.enumerate()) == threads
    assert asyncio.all_tasks() - {asyncio.current_task()} == server.tasks


@pytest.mark.asyncio
async def test_closing_that_was_cancelled_can_be_repeated(server: ScriptedServer):
    client = KeyedClient(base_url=server.url, api_key=KEY, max_connections=2)
    tasks = [asyncio.create_task(client.exchange("GET", "/stall")) for _ in range(3)]
    await server.until(lambda: len(server.requests) == 2)
    closing = asyncio.create_task(client.aclose())
    await ticks(1)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await client.aclose()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.ClientClosed] * 3
    await server.until(lambda: server.open_connections == 0)


@pytest.mark.asyncio
async def test_a_cancellation_during_closing_stays_a_cancellation(server: ScriptedServer):
    client = KeyedClient(base_url=server.url, api_key=KEY)
    task = asyncio.create_task(client.exchange("GET", "/stall"))
    await server.until(lambda: len(server.requests) == 1)
    task.cancel()
    await client.aclose()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


def test_a_client_that_was_never_used_closes_anywhere():
    client = KeyedClient(base_url="http://host", api_key=KEY)
    asyncio.run(client.aclose())
    asyncio.run(client.aclose())
    with pytest.raises(errors.ClientClosed):
        asyncio.run(client.exchange("GET", "/"))


def test_a_second_event_loop_is_refused():
    with asyncio.Runner() as first, asyncio.Runner() as second:

        async def start() -> tuple[ScriptedServer, KeyedClient]:
            server = await ScriptedServer().__aenter__()
            server.script("/good", answer(json=1))
            client = KeyedClient(base_url=server.url, api_key=KEY)
            await client.exchange("GET", "/good")
            return server, client

        async def stop(server: ScriptedServer, client: KeyedClient) -> None:
            assert (await client.exchange("GET", "/good")).json() == 1
            await client.aclose()
            await server.__aexit__(None, None, None)

        server, client = first.run(start())
        with pytest.raises(errors.ClientClosed, match="another one: create one client per event loop"):
            second.run(client.exchange("GET", "/good"))
        with pytest.raises(errors.ClientClosed, match="another one"):
            second.run(client.aclose())
        first.run(stop(server, client))


# Responses that come twice


@pytest.mark.asyncio
@pytest.mark.parametrize("surplus", ["the same again", "half of it", "a byte", "garbage"])
async def test_bytes_behind_a_response_are_never_taken_for_the_next_one(server: ScriptedServer, surplus: str):
    """The request behind them fails on its connection, and is sent again by the ordinary retry policy."""

    def make(request: Request) -> Behaviour:
        body = request.target.encode()
        encoded = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        behind = {"the same again": encoded, "half of it": encoded[:20], "a byte": b"\n", "garbage": b"\x00\xff"}

        async def act(exchange: Exchange) -> None:
            await exchange.send(encoded + behind[surplus] if request.target.endswith("1") else encoded)

        return Behaviour(act)

    server.script("/number", computed(make))
    http = HttpClient(base_url=server.url, max_connections=1)
    api = ServiceApi(http, http, Auth(Secret(KEY), Secret("")), retry=RetryPolicy(initial_wait=0.0), poll_timeout=10.0)
    for number in range(6):
        body = await api.send(new_request("GET", f"/number?{number}"), lambda response: response.body)
        assert body == f"/number?{number}".encode()
    assert server.connections <= 2, "only the connection with surplus bytes is given up"
    await http.aclose()


@pytest.mark.asyncio
async def test_honest_responses_that_are_equal_are_each_for_their_own_request(server: ScriptedServer):
    """No response is compared with another: a POST is sent once, whatever came before it."""

    async def act(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    server.script("/publish", Behaviour(act))
    client = KeyedClient(base_url=server.url)
    for _ in range(3):
        assert (await client.exchange("POST", "/publish", json={})).json() == {}
    assert [request.connection for request in server.requests] == [1, 1, 1]
    await client.aclose()
