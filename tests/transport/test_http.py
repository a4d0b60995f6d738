"""One exchange against a real server on loopback."""

import asyncio
import gzip
import json
import logging
import pickle
import socket
import ssl
import subprocess
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import httpx2
import pytest
import pytest_asyncio
import structlog

from tests.support.scripted_server import (
    Behaviour,
    Request,
    ScriptedServer,
    answer,
    computed,
    drip,
    half_a_body,
    raw,
    reset,
    stall,
    stop_reading,
)
from tests.transport.keyed import KeyedClient
from tinkex_py import errors, telemetry
from tinkex_py.telemetry import Event
from tinkex_py.version import __version__

pytestmark = pytest.mark.asyncio
KEY = "tml-very-secret-key"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as running:
        yield running


@pytest_asyncio.fixture
async def client(server: ScriptedServer) -> AsyncIterator[KeyedClient]:
    made = KeyedClient(base_url=server.url, api_key=KEY, max_connections=4)
    yield made
    await made.aclose()
    await server.until(lambda: server.open_connections == 0)


@pytest.fixture
def events() -> Iterator[list[Event]]:
    seen: list[Event] = []
    handler_id = telemetry.attach(seen.append, events="tinkex.http.request.*")
    yield seen
    telemetry.detach(handler_id)


# What is sent


async def test_headers_and_body(server: ScriptedServer, client: KeyedClient):
    server.script("/a/b", answer(json={"ok": True}, headers={"X-Thing": "Yes"}))
    got = await client.exchange(
        "post", "a/b?q=1", content=b"abc", content_type="application/x-protobuf", accept="x/y", headers={"X-More": "m"}
    )
    (request,) = server.requests
    assert (request.method, request.target, request.body) == ("POST", "/a/b?q=1", b"abc")
    assert request.headers["x-api-key"] == KEY
    assert request.headers["user-agent"] == f"tinkex-py/{__version__}"
    assert request.headers["accept"] == "x/y"
    assert request.headers["content-type"] == "application/x-protobuf"
    assert request.headers["content-length"] == "3"
    assert request.headers["x-more"] == "m"
    assert "transfer-encoding" not in request.headers
    assert (got.status, got.headers["x-thing"], got.json()) == (200, "Yes", {"ok": True})
    assert got.media_type == "application/json"


async def test_json_and_defaults(server: ScriptedServer, client: KeyedClient):
    server.script("/a", answer())
    await client.exchange("POST", "/a", json={"ä": [1, None, 0.5]})
    await client.exchange("POST", "/a")
    await client.exchange("GET", "/a")
    with_json, without_body, get = server.requests
    assert with_json.json() == {"ä": [1, None, 0.5]}
    assert with_json.headers["content-type"] == "application/json"
    assert with_json.headers["accept"] == "application/json"
    assert (without_body.body, without_body.headers["content-length"]) == (b"", "0")
    assert "content-length" not in get.headers
    assert server.connections == 1


@pytest.mark.parametrize("prefix", ["", "/", "/services/tinker", "/services/tinker/"])
async def test_the_path_of_the_base_url_is_kept(server: ScriptedServer, prefix: str):
    expected = prefix.rstrip("/") + "/api/v1/x"
    server.script(expected, answer())
    client = KeyedClient(base_url=server.url + prefix, api_key=KEY)
    for path in ("/api/v1/x", "api/v1/x"):
        assert (await client.exchange("GET", path)).status == 200
    await client.aclose()


async def test_a_proxy_that_the_environment_names(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    server.script("/a", answer(json={"first": True}), answer(json={"first": False}))
    client = KeyedClient(base_url="http://behind.test")
    answers = [(await client.exchange("GET", "a")).json() for _ in range(2)]
    await client.aclose()
    assert answers == [{"first": True}, {"first": False}]
    assert [request.target for request in server.requests] == ["http://behind.test/a"] * 2
    assert server.connections == 1
    await server.until(lambda: server.open_connections == 0)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("behavior", ["refuses", "closes", "says nothing"])
async def test_a_dead_proxy_is_named_and_the_service_is_not_suspected(
    behavior: str, scheme: str, monkeypatch: pytest.MonkeyPatch
):
    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        if behavior == "says nothing":
            await reader.read()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    if behavior == "refuses":
        server.close()
    monkeypatch.setenv(f"{scheme}_proxy", address)
    kind, seconds = (errors.TimeoutExceeded, 0.2) if behavior == "says nothing" else (errors.ConnectionFailed, 60.0)
    client = KeyedClient(base_url=f"{scheme}://service.test", timeout=seconds)
    with pytest.raises(
        kind, match=f"the proxy '127.0.0.1', which the environment variable {scheme}_proxy names"
    ) as caught:
        await client.exchange("GET", "a")
    assert "base_url" not in str(caught.value)
    await client.aclose()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("key", [None, KEY])
async def test_headers_of_a_request_replace_those_of_the_client_but_never_the_key(
    server: ScriptedServer, key: str | None
):
    server.script("/a", answer(headers={"set-cookie": "who=me; Path=/"}))
    headers = {"User-Agent": "mine", "X-One": "1", **({} if key is None else {"x-api-key": "other"})}
    client = KeyedClient(base_url=server.url, api_key=key, headers=headers)
    for _ in range(2):
        await client.exchange("GET", "/a", headers={"x-one": "2", **({} if key is None else {"X-API-KEY": "another"})})
    await client.aclose()
    for request in server.requests:
        assert (request.headers["user-agent"], request.headers["x-one"]) == ("mine", "2")
        assert request.headers.get("x-api-key") == key
        assert "cookie" not in request.headers


async def test_large_bodies_both_ways(server: ScriptedServer, client: KeyedClient):
    payload = bytes(range(256)) * (10 << 10)
    server.script("/echo", computed(lambda request: answer(200, request.body)))
    for kind in (bytes, bytearray, memoryview):
        assert (await client.exchange("POST", "/echo", content=kind(payload))).body == payload
    assert {request.headers["content-length"] for request in server.requests} == {str(len(payload))}
    view = memoryview(bytearray(range(16))).cast("f")
    assert (await client.exchange("POST", "/echo", content=view)).body == bytes(range(16))


async def test_a_compressed_response(server: ScriptedServer, client: KeyedClient):
    body = json.dumps({"a": list(range(1000))}).encode()
    server.script("/a", answer(200, gzip.compress(body), headers={"content-encoding": "gzip"}))
    assert (await client.exchange("GET", "/a")).body == body


async def test_a_status_is_returned_not_raised(server: ScriptedServer, client: KeyedClient):
    for status in (204, 304, 400, 401, 404, 409, 429, 500, 503):
        server.script("/a", answer(status, headers={"retry-after": "3"}))
        response = await client.exchange("GET", "/a")
        assert (response.status, response.headers["retry-after"]) == (status, "3")


# Redirects


async def test_redirects_within_the_origin_keep_method_body_and_key(server: ScriptedServer, client: KeyedClient):
    server.script("/a", answer(307, headers={"location": "/b?x=1"}))
    server.script("/b", answer(308, headers={"location": f"{server.url}/c"}))
    server.script("/c", answer(json="there"))
    body = b"z" * (1200 << 10)
    assert (await client.exchange("POST", "/a", content=body)).json() == "there"
    assert [(request.method, request.target) for request in server.requests] == [
        ("POST", "/a"),
        ("POST", "/b?x=1"),
        ("POST", "/c"),
    ]
    assert all(request.body == body and request.headers["x-api-key"] == KEY for request in server.requests)


async def test_a_redirect_to_another_origin_is_not_followed(server: ScriptedServer, client: KeyedClient):
    async with ScriptedServer() as other:
        other.script("/b", answer(json="stolen"))
        for status in (301, 302, 303, 307, 308):
            server.script("/a", answer(status, headers={"location": f"{other.url}/b"}))
            got = await client.exchange("GET", "/a")
            assert got.status == status
        for location in ("//127.0.0.2/x", f"https://127.0.0.1:{server.port}/b", "http://[bad", "ftp://x/y"):
            server.script("/a", answer(307, headers={"location": location}))
            assert (await client.exchange("GET", "/a")).status == 307
        assert other.connections == 0


async def test_a_post_never_turns_into_a_get(server: ScriptedServer, client: KeyedClient):
    server.script("/b", answer())
    for status in (301, 302, 303):
        server.script("/a", answer(status, headers={"location": "/b"}))
        assert (await client.exchange("POST", "/a", content=b"x")).status == status
        assert (await client.exchange("GET", "/a")).status == 200
    assert {request.method for request in server.requests_to("/b")} == {"GET"}


async def test_a_redirect_loop_ends(server: ScriptedServer, client: KeyedClient):
    server.script("/a", answer(307, headers={"location": "/a"}))
    assert (await client.exchange("GET", "/a")).status == 307
    assert len(server.requests) == 6


# Failures


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (reset(), errors.ConnectionFailed),
        (raw(b""), errors.ConnectionFailed),
        (half_a_body(b"x" * 1000), errors.ConnectionFailed),
        (raw(b"HTTP/1.1 200 OK\r\ncontent-le", then_reset=True), errors.ConnectionFailed),
        (raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab"), errors.ConnectionFailed),
        (raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), errors.InvalidResponse),
        (raw(b"\x00\xff\x16\x03\x01" * 50), errors.InvalidResponse),
        (raw(b"HTTP/1.1 two OK\r\n\r\n"), errors.InvalidResponse),
        (raw(b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n"), errors.InvalidResponse),
        (raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"), errors.InvalidResponse),
        (answer(200, b"not gzip at all", headers={"content-encoding": "gzip"}), errors.InvalidResponse),
        (stall(), errors.TimeoutExceeded),
        (drip(b"x" * 1000, first=0), errors.TimeoutExceeded),
        (drip(b"x" * 1000, first=500), errors.TimeoutExceeded),
        (raw(b"HTTP/1.1 200", keep_open=True), errors.TimeoutExceeded),
    ],
)
async def test_a_failed_exchange_is_a_typed_error_and_the_client_still_works(
    server: ScriptedServer, client: KeyedClient, events: list[Event], behaviour: Behaviour, kind: type[Exception]
):
    server.script("/a", behaviour)
    server.script("/good", answer(json=1))
    timeout = 0.05 if kind is errors.TimeoutExceeded else 20.0
    with pytest.raises(kind) as caught:
        await client.exchange("POST", "/a?token=hidden", content=b"body text", timeout=timeout)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert f"POST /a at 127.0.0.1:{server.port}" in message
    assert "hidden" not in message
    assert "body text" not in message
    assert caught.value.__cause__ is None  # it may hold the request, and that the key
    start, end = events
    assert start.metadata == {"method": "POST", "path": "/a", "attempt": 1}
    assert end.name == "tinkex.http.request.exception"
    assert end.metadata == {**start.metadata, "reason": kind.__name__}
    assert end.exception is caught.value
    assert (await client.exchange("GET", "/good")).json() == 1


async def test_a_body_that_the_service_does_not_read_times_out(server: ScriptedServer, client: KeyedClient):
    server.script("/a", stop_reading())
    with pytest.raises(errors.TimeoutExceeded):
        await client.exchange("POST", "/a", content=bytes(12 << 20), timeout=0.1)
    assert server.started == ["/a"]
    assert server.requests == []
    server.reading_again.set()


async def test_no_service_at_the_address():
    port = closed_port()
    for host, message in ((f"127.0.0.1:{port}", "nothing answers"), ("no-such-host.invalid", "cannot be resolved")):
        client = KeyedClient(base_url=f"http://{host}", api_key=KEY)
        with pytest.raises(errors.ConnectionFailed, match=f"GET /a at {host}.*{message}"):
            await client.exchange("GET", "/a")
        await client.aclose()


async def test_input_that_cannot_be_sent(server: ScriptedServer, client: KeyedClient):
    for value in (float("nan"), {"a": float("inf")}, {"a": object()}):
        with pytest.raises(errors.InvalidData, match=r"POST /a: .* JSON"):
            await client.exchange("POST", "/a", json=value)
    for headers in ({"X-Bad": "line\r\nX-Other: 1"}, {"X-Bad": "ü"}, {"bad name": "1"}, {"": "1"}):
        with pytest.raises(errors.InvalidData, match="header") as caught:
            await client.exchange("GET", "/a", headers=headers)
        assert "line" not in str(caught.value)
    with pytest.raises(errors.InvalidData, match="path"):
        await client.exchange("GET", "/a\x00b")
    assert server.started == []


# Events


async def test_events_of_a_good_exchange(server: ScriptedServer, client: KeyedClient, events: list[Event]):
    server.script("/a", answer(503, b"12345"))
    await client.exchange("get", "/a?secret=1", attempt=3)
    start, stop = events
    metadata = {"method": "GET", "path": "/a", "attempt": 3}
    assert (start.name, dict(start.metadata)) == ("tinkex.http.request.start", metadata)
    assert (stop.name, dict(stop.metadata)) == ("tinkex.http.request.stop", metadata)
    assert set(start.measurements) == {"system_time"}
    assert set(stop.measurements) == {"duration", "status", "bytes"}
    assert (stop.measurements["status"], stop.measurements["bytes"]) == (503, 5)


# The key


async def test_nothing_shows_the_key(server: ScriptedServer, caplog: pytest.LogCaptureFixture):
    client = KeyedClient(base_url=server.url, api_key=KEY)
    server.script("/good", answer(json=1))
    server.script("/echo", answer(401, json={"detail": f"key {KEY} is wrong"}))
    server.script("/bad", raw(b"garbage\r\n\r\n"))
    shown: list[str] = [repr(client.http), str(client.http)]
    telemetry_id = telemetry.attach(lambda event: shown.append(repr(event)))
    with caplog.at_level(logging.DEBUG), structlog.testing.capture_logs() as lines:
        shown.append(repr(await client.exchange("GET", "/good")))
        shown.append(repr(await client.exchange("GET", "/echo")))
        with pytest.raises(errors.InvalidResponse) as caught:
            await client.exchange("GET", "/bad")
        await client.aclose()
    telemetry.detach(telemetry_id)
    assert lines
    shown += [caplog.text, repr(lines), "".join(traceback.format_exception(caught.value))]
    shown.append(pickle.dumps(caught.value).decode("latin-1"))
    assert not [text for text in shown if KEY in text]
    with pytest.raises(TypeError, match="create a new one"):
        pickle.dumps(client.http)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the openssl command to make a certificate")
    return certificate, key


async def test_tls_with_one_context_and_no_thread_left(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    threads = set(threading.enumerate())
    async with ScriptedServer(tls=context) as server:
        server.script("/a", answer(json=1))
        distrusting = KeyedClient(base_url=server.url, api_key=KEY)
        with pytest.raises(errors.ConnectionFailed, match=r"not trusted: self.signed.*SSL_CERT_FILE"):
            await distrusting.exchange("GET", "/a")
        await distrusting.aclose()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        loaded: list[int] = []
        original = httpx.create_ssl_context
        monkeypatch.setattr(httpx, "create_ssl_context", lambda *a, **k: (loaded.append(1), original(*a, **k))[1])
        client = KeyedClient(base_url=server.url, api_key=KEY, max_connections=4)
        answers = await asyncio.gather(*(client.exchange("GET", "/a") for _ in range(8)))
        assert [got.json() for got in answers] == [1] * 8
        await client.aclose()
        await server.until(lambda: server.open_connections == 0)
    assert not {thread for thread in threading.enumerate() if thread.name.startswith("tinkex")} - threads


async def test_cancelled_requests_over_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    async with ScriptedServer(tls=context) as server:
        server.script("/good", answer(json=1))
        server.script("/stall", stall())
        client = KeyedClient(base_url=server.url, api_key=KEY, max_connections=4)
        for steps in range(0, 40, 2):
            tasks = [asyncio.create_task(client.exchange("GET", "/stall")) for _ in range(6)]
            for _ in range(steps):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert all(task.cancelled() for task in tasks)
        answers = await asyncio.gather(*(client.exchange("GET", "/good") for _ in range(8)))
        assert [got.json() for got in answers] == [1] * 8
        await client.aclose()
        await server.until(lambda: server.open_connections == 0)


async def test_a_missing_certificate_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    client = KeyedClient(base_url="https://127.0.0.1:9", api_key=KEY)
    for _ in range(2):
        with pytest.raises(errors.ConfigError, match="SSL_CERT_FILE"):
            await client.exchange("GET", "/a")
    await client.aclose()


# A client of the user's own


@pytest.mark.parametrize("library", [httpx, httpx2])
async def test_a_given_client_is_used_and_not_closed(server: ScriptedServer, library: object):
    server.script("/p/a", answer(json=1), answer(307, headers={"location": "/p/a"}), answer(json=2))
    server.script("/p/bad", raw(b"garbage\r\n\r\n"))
    server.script("/p/slow", stall())
    async with library.AsyncClient(headers={"X-Theirs": "1"}, follow_redirects=True) as theirs:  # type: ignore[attr-defined]
        client = KeyedClient(base_url=f"{server.url}/p", api_key=KEY, http_client=theirs)
        assert (await client.exchange("POST", "/a", content=bytes(2 << 20))).json() == 1
        assert (await client.exchange("GET", "/a")).json() == 2
        with pytest.raises(errors.InvalidResponse):
            await client.exchange("GET", "/bad")
        with pytest.raises(errors.TimeoutExceeded):
            await client.exchange("GET", "/slow", timeout=0.05)
        with pytest.raises(errors.InvalidData, match="path"):
            await client.exchange("GET", "/a\x00b")
        await client.aclose()
        with pytest.raises(errors.ClientClosed):
            await client.exchange("GET", "/a")
        assert not theirs.is_closed
    request: Request = server.requests[0]
    assert (request.headers["x-theirs"], request.headers["x-api-key"]) == ("1", KEY)
    assert request.headers["content-length"] == str(2 << 20)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ZeroDivisionError(), ZeroDivisionError),
        (httpx.ConnectTimeout("text"), errors.TimeoutExceeded),
        (httpx2.PoolTimeout("text"), errors.TimeoutExceeded),
        (httpx.ProxyError("text"), errors.ConnectionFailed),
        (httpx2.WriteError("text"), errors.ConnectionFailed),
        (httpx.UnsupportedProtocol("text"), errors.ConnectionFailed),
        (ssl.SSLError("text"), errors.ConnectionFailed),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), errors.ConnectionFailed),
        (httpx2.RemoteProtocolError("illegal status line"), errors.InvalidResponse),
        (httpx.LocalProtocolError("text"), errors.InvalidData),
        (TimeoutError("text"), errors.TimeoutExceeded),
    ],
)
async def test_failures_of_a_given_client(raised: Exception, kind: type[Exception]):
    def broken(request: httpx.Request) -> httpx.Response:
        raise raised

    async with httpx.AsyncClient(transport=httpx.MockTransport(broken)) as theirs:
        client = KeyedClient(base_url="http://host", api_key=KEY, http_client=theirs)
        with pytest.raises(kind) as caught:
            await client.exchange("GET", "/a")
        assert type(caught.value) is kind
        assert kind is ZeroDivisionError or caught.value.__cause__ is None
        assert "text" not in str(caught.value)
        await client.aclose()
