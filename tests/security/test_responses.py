"""Responses that are larger than they look, damaged, or that ask for an endless wait."""

import asyncio
import contextlib
import gzip
import threading
import tracemalloc
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import zstandard

from tests.support.scripted_server import Behaviour, Exchange, ScriptedServer, answer, drip
from tests.transport.keyed import KeyedClient
from tinkex_py import (
    AsyncServiceClient,
    Datum,
    InvalidResponse,
    ModelInput,
    RetryPolicy,
    TimeoutExceeded,
    TinkexConfig,
    TinkexError,
)
from tinkex_py.transport.bodies import BodyTooLarge, DecodingError, body_of

pytestmark = pytest.mark.asyncio
MIB = 1 << 20
LIMIT = 2 * MIB
DATUM = Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]})


def zstd(body: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(body)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda body: gzip.compress(body, 1),
    "X-GZIP": lambda body: gzip.compress(body, 1),
    "deflate": lambda body: zlib.compress(body, 1),
    "zstd": zstd,
    "identity, gzip": lambda body: gzip.compress(body, 1),
    "gzip, gzip": lambda body: gzip.compress(gzip.compress(body, 1), 1),
    "zstd, gzip": lambda body: gzip.compress(zstd(body), 1),
    "deflate, zstd": lambda body: zstd(zlib.compress(body, 1)),
}


def cut(body: bytes) -> deque[bytes]:
    """A body in pieces as they arrive from a socket."""
    return deque(body[start : start + (1 << 18)] for start in range(0, len(body), 1 << 18))


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    """Peak of the memory of the test, in bytes."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


# One response


@pytest.mark.parametrize("status", [200, 400, 503])
@pytest.mark.parametrize("encoding", PACK)
async def test_a_response_beyond_the_limit_is_refused_with_bounded_memory(memory, encoding: str, status: int):
    async with ScriptedServer() as server:
        body = PACK[encoding](bytes(64 * MIB))
        server.script("/a", answer(status, body, headers={"content-encoding": encoding}))
        client = KeyedClient(base_url=server.url, max_response_bytes=LIMIT)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(InvalidResponse, match=f"GET /a at 127.0.0.1:{server.port}.* {LIMIT} bytes") as caught:
            await client.exchange("GET", "/a")
        assert "max_response_bytes of TinkexConfig" in str(caught.value)
        assert caught.value.is_too_large
        assert memory() - before < 3 * LIMIT
        await client.aclose()


@pytest.mark.parametrize("encoding", ["", "gzip"])
async def test_an_endless_response_is_read_up_to_the_limit(encoding: str):
    """The compressed one decompresses to nothing, for ever."""
    piece = (gzip.compress(b"") if encoding else b"x" * 20) * 3200
    head = f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-encoding: {encoding or 'identity'}\r\n\r\n"
    sent = 0

    async def endless(exchange: Exchange) -> None:
        nonlocal sent
        exchange.keep_alive = False
        await exchange.send(head.encode())
        with contextlib.suppress(ConnectionError):
            while True:
                await exchange.send(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += len(piece)

    async with ScriptedServer() as server:
        server.script("/a", Behaviour(endless))
        client = KeyedClient(base_url=server.url, max_response_bytes=LIMIT)
        with pytest.raises(InvalidResponse, match=f"{LIMIT} bytes"):
            await client.exchange("GET", "/a")
        await client.aclose()
        await server.until(lambda: server.running == 0)
    assert sent < LIMIT + 32 * MIB  # what the buffers of both sockets hold


@pytest.mark.parametrize("encoding", ["", "gzip", "deflate", "zstd", "zstd, gzip"])
async def test_a_healthy_response_of_50_mb_passes(encoding: str):
    body = bytes(range(256)) * (50 * MIB // 256)
    async with ScriptedServer() as server:
        packed, headers = (PACK[encoding](body), {"content-encoding": encoding}) if encoding else (body, {})
        server.script("/a", answer(200, packed, headers=headers))
        client = KeyedClient(base_url=server.url, max_response_bytes=len(body))
        assert (await client.exchange("GET", "/a")).body == body
        await client.aclose()


async def test_only_what_can_be_decompressed_in_steps_is_asked_for():
    """Also by a user's own client, which by default accepts more."""
    async with ScriptedServer() as server, httpx.AsyncClient() as own:
        server.script("/a", answer(200, PACK["zstd"](b"abc"), headers={"content-encoding": "zstd"}))
        for http_client in (None, own):
            client = KeyedClient(base_url=server.url, http_client=http_client, max_response_bytes=LIMIT)
            assert (await client.exchange("GET", "/a")).body == b"abc"
            await client.aclose()
        assert {request.headers["accept-encoding"] for request in server.requests} == {"gzip, deflate, zstd"}


async def test_a_response_through_a_users_own_client_has_the_limit():
    async with ScriptedServer() as server, httpx.AsyncClient() as own:
        server.script("/a", answer(200, PACK["gzip"](bytes(64 * MIB)), headers={"content-encoding": "gzip"}))
        client = KeyedClient(base_url=server.url, http_client=own, max_response_bytes=LIMIT)
        with pytest.raises(InvalidResponse, match="max_response_bytes"):
            await client.exchange("GET", "/a")
        await client.aclose()


GZIP, ZSTD = gzip.compress(b"x" * 1000), zstd(b"x" * 1000)
LARGE_WINDOW = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters(window_log=27, write_content_size=0)
).compressobj()
DAMAGED = {
    "not gzip": ("gzip", b"x" * 100),
    "truncated gzip": ("gzip", GZIP[:-9]),
    "gzip without its checksum": ("gzip", GZIP[:-8]),
    "gzip with a wrong checksum": ("gzip", GZIP[:-8] + bytes(8)),
    "bytes behind gzip": ("gzip", GZIP + b"x"),
    "truncated zstd": ("zstd", ZSTD[:-1]),
    "bytes behind zstd": ("zstd", ZSTD + b"x"),
    "a zstd window of 128 MiB": ("zstd", LARGE_WINDOW.compress(b"x") + LARGE_WINDOW.flush()),
    "truncated inside": ("zstd, gzip", gzip.compress(ZSTD[:-1])),
    "an encoding that was not accepted": ("br", b"\x0b\x01\x80abc\x03"),
    "four encodings": ("gzip, gzip, gzip, gzip", gzip.compress(gzip.compress(gzip.compress(GZIP)))),
}


@pytest.mark.parametrize("name", DAMAGED)
async def test_a_damaged_response_is_refused(name: str):
    encoding, body = DAMAGED[name]
    async with ScriptedServer() as server:
        server.script("/a", answer(200, body, headers={"content-encoding": encoding}))
        client = KeyedClient(base_url=server.url)
        with pytest.raises(InvalidResponse, match="could not be decompressed") as caught:
            await client.exchange("GET", "/a")
        assert not caught.value.is_too_large
        await client.aclose()


async def test_several_members_and_frames_are_one_body():
    assert await body_of(cut(GZIP * 3), "gzip", LIMIT) == b"x" * 3000
    assert await body_of(cut(ZSTD * 3), "zstd", LIMIT) == b"x" * 3000
    assert await body_of(deque(), "gzip", LIMIT) == b""
    with pytest.raises(DecodingError, match="incomplete"):
        await body_of(deque([b"\x1f"]), "gzip", LIMIT)


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "zstd, gzip"])
async def test_each_of_several_encodings_has_the_limit(encoding: str):
    """Empty members and frames, of which any number decompresses to nothing."""
    empty = gzip.compress(b"") if encoding.startswith("gzip") else zstd(b"")
    inner = empty * (LIMIT // len(empty) + 1)
    packed = inner if "," not in encoding else gzip.compress(inner)
    if "," not in encoding:
        assert await body_of(cut(packed), encoding, LIMIT) == b""
        return
    with pytest.raises(BodyTooLarge):
        await body_of(cut(packed), encoding, LIMIT)


# Off the event loop


class Gated(deque[bytes]):
    """A body whose pieces can be taken only after the event loop has opened it."""

    def __init__(self, body: bytes) -> None:
        super().__init__(cut(body))
        self.reached, self.open = asyncio.Event(), threading.Event()
        self._loop = asyncio.get_running_loop()

    def popleft(self) -> bytes:
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self.open.wait(60), "the event loop did not run meanwhile"
        return super().popleft()


@pytest.mark.parametrize("encoding", PACK)
async def test_a_large_body_is_decompressed_while_the_event_loop_runs(encoding: str):
    body = b"".join(zlib.crc32(number.to_bytes(4)).to_bytes(4) for number in range(MIB // 4))  # incompressible
    parts = Gated(PACK[encoding](body))
    reading = asyncio.create_task(body_of(parts, encoding, 2 * MIB))
    await parts.reached.wait()
    parts.open.set()
    assert await reading == body


async def test_a_cancelled_or_late_caller_ends_the_thread_after_one_step():
    packed = zstandard.ZstdCompressor().compressobj()
    body = b"".join(packed.compress(zlib.crc32(n.to_bytes(4)).to_bytes(4) * 4096) for n in range(1 << 12))
    parts = Gated(body + packed.flush() + bytes(MIB))
    pieces = len(parts)
    reading = asyncio.create_task(body_of(parts, "zstd", 1 << 30))
    await parts.reached.wait()
    reading.cancel()
    await asyncio.sleep(0)
    assert not reading.done()  # it waits for its thread
    parts.open.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert len(parts) == pieces - 1
    assert [thread.name for thread in threading.enumerate() if "tinkex-body" in thread.name] == []


# Every kind of response

BOMB = zstd(bytes(64 * MIB))
CONFIG = {"proto_write_fwdbwd": True}
KINDS: dict[str, tuple[str, type[TinkexError]]] = {
    "settings": ("/api/v1/client/config", InvalidResponse),
    "token": ("/api/v1/auth/token", InvalidResponse),
    "session": ("/api/v1/create_session", InvalidResponse),
    "list of models": ("/api/v1/get_server_capabilities", InvalidResponse),
    "model": ("/api/v1/create_model", InvalidResponse),
    "submission": ("/api/v1/forward_backward", TinkexError),
    "result": ("/api/v1/retrieve_future", InvalidResponse),
}


def scripted(server: ScriptedServer, *, token: bool = False) -> None:
    server.script("/api/v1/client/config", answer(json={**CONFIG, "pjwt_auth_enabled": token}))
    server.script("/api/v1/auth/token", answer(json={"jwt": "token"}))
    server.script("/api/v1/create_session", answer(json={"session_id": "s"}))
    server.script("/api/v1/sessions/s/finish", answer(json={}))
    server.script("/api/v1/get_server_capabilities", answer(json={"supported_models": [{"model_name": "m"}]}))
    server.script("/api/v1/create_model", answer(json={"request_id": "1"}))
    server.script("/api/v1/retrieve_future", answer(json={"model_id": "m"}))
    server.script("/api/v1/forward_backward", answer(json={"request_id": "2"}))


async def step(service: AsyncServiceClient, prepared: Callable[[], None]) -> Any:
    """Makes every kind of request; the last two only after the preparation."""
    await service.get_server_capabilities()
    training = await service.create_lora_training_client("m")
    prepared()
    return await training.forward_backward([DATUM])


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_response_has_a_limit(memory, kind: str, status: int):
    path, error = KINDS[kind]
    async with ScriptedServer() as server:
        scripted(server, token=kind == "token")
        bomb = answer(status, BOMB, headers={"content-encoding": "zstd", "content-type": "application/json"})

        def drop_it() -> None:
            server.script(path, bomb)

        if kind not in ("submission", "result"):
            drop_it()
        once = RetryPolicy(max_attempts=1)
        config = TinkexConfig(base_url=server.url, api_key="tml-k", retry=once, max_response_bytes=LIMIT)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        async with asyncio.timeout(60):
            service = AsyncServiceClient(config)
            with pytest.raises(error) as caught:
                await step(service, drop_it)
            await service.aclose()
        messages = f"{caught.value} {caught.value.__cause__}"
        assert "max_response_bytes of TinkexConfig" in messages
        assert f"{path} at 127.0.0.1:{server.port}" in messages
        assert memory() - before < 3 * LIMIT


async def test_a_result_that_is_too_large_is_not_requested_again():
    async with ScriptedServer() as server:
        scripted(server)

        def drop_it() -> None:
            server.script("/api/v1/retrieve_future", answer(200, BOMB, headers={"content-encoding": "zstd"}))

        config = TinkexConfig(base_url=server.url, api_key="tml-k", max_response_bytes=LIMIT)
        async with AsyncServiceClient(config) as service:
            with pytest.raises(InvalidResponse, match="max_response_bytes"):
                await step(service, drop_it)
        assert len(server.requests_to("/api/v1/retrieve_future")) == 2  # of the model, and of the pass


# Waits

FOREVER = {"retry-after": "1e9"}
OTHER_FORMS = [
    {"retry-after": "60"},
    {"retry-after-ms": "9" * 300},
    {"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"},
]


@pytest.mark.parametrize(
    ("kind", "status", "headers"),
    [
        *((kind, 402, FOREVER) for kind in ("model", "submission", "result")),
        *((kind, 429, FOREVER) for kind in ("settings", "model", "submission", "result")),
        *(("result", 503, headers) for headers in OTHER_FORMS),
        *(("submission", 402, headers) for headers in OTHER_FORMS),
    ],
)
async def test_a_service_cannot_choose_how_long_a_call_waits(kind: str, status: int, headers: dict[str, str]):
    """The limits of the client are 0.3 s; the service asks for a minute or more."""
    path, _ = KINDS[kind]
    async with ScriptedServer() as server:
        scripted(server)

        def drop_it() -> None:
            server.script(path, answer(status, json={"detail": "later"}, headers=headers))

        if kind not in ("submission", "result"):
            drop_it()
        retry = RetryPolicy(deadline=0.3)
        service = AsyncServiceClient(TinkexConfig(base_url=server.url, api_key="tml-k", retry=retry, billing_pause=0.3))
        async with asyncio.timeout(30):
            with pytest.raises(TinkexError, match=f"returned {status}"):
                await step(service, drop_it)
        await service.aclose()


async def test_a_result_that_never_completes_ends_at_the_deadline():
    """The service is alive, so a poll without any response would only be repeated."""
    async with ScriptedServer() as server:
        scripted(server)
        server.script("/api/v1/healthz", answer(json={"status": "ok"}))
        retry = RetryPolicy(deadline=0.5, initial_wait=0.0)
        service = AsyncServiceClient(TinkexConfig(base_url=server.url, api_key="tml-k", retry=retry, poll_timeout=0.1))

        def drop_it() -> None:
            server.script("/api/v1/retrieve_future", drip(b"x" * 1000, first=10))

        async with asyncio.timeout(30):
            with pytest.raises(TimeoutExceeded, match="no complete response within") as caught:
                await step(service, drop_it)
        assert caught.value.response_began
        await service.aclose()


async def test_a_pending_result_says_nothing_about_pauses():
    """A service that asks to wait for a year is polled again at the pace of the client."""
    async with ScriptedServer() as server:
        scripted(server)
        year = {"retry-after": "31536000", "retry-after-ms": "31536000000"}
        pending = {"type": "try_again", "queue_state": "paused_capacity", "retry_after": 31536000, "backoff": 1e9}

        def drop_it() -> None:
            result = answer(json={"loss_fn_outputs": [{}]})
            server.script("/api/v1/retrieve_future", answer(408, json=pending, headers=year), result)

        async with AsyncServiceClient(TinkexConfig(base_url=server.url, api_key="tml-k")) as service:
            async with asyncio.timeout(30):
                assert (await step(service, drop_it)).num_datums == 1
