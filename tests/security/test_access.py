"""Access to the embedded service: from this machine, or with the key."""

import asyncio
import hmac
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.support.layers import innermost
from tinkex_py.errors import ConfigError
from tinkex_py.local import LocalOptions, serve

pytestmark = pytest.mark.asyncio
KEY = "tml-right-0123456789"


@asynccontextmanager
async def serving(options: LocalOptions, *host: str) -> AsyncIterator[str]:
    listening: asyncio.Queue[str] = asyncio.Queue()
    running = asyncio.create_task(serve(options, *host, on_listening=listening.put_nowait))
    told = asyncio.create_task(listening.get())
    await asyncio.wait([running, told], return_when=asyncio.FIRST_COMPLETED)
    assert told.done(), running.exception()
    try:
        yield told.result()
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_the_default_is_loopback_and_nothing_else():
    async with serving(LocalOptions()) as address:
        host, port = httpx.URL(address).host, httpx.URL(address).port
        assert host == "127.0.0.1"
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {host}
        for other in [*others, "127.0.0.2"]:
            with pytest.raises(OSError, match="Connect call failed"):
                await asyncio.open_connection(other, port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "", "127.0.0.1.example.org", "0"])
async def test_anywhere_else_needs_a_key(host):
    with pytest.raises(
        ConfigError, match="other machines can reach host .*: set an api_key|host must be a non-empty string"
    ):
        async with asyncio.timeout(20):
            await serve(LocalOptions(), host, on_listening=print)


async def test_with_a_key_it_may_listen_anywhere_and_asks_for_it():
    async with serving(LocalOptions(api_key=KEY), "0.0.0.0") as address, httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{httpx.URL(address).port}/api/v1/create_session"
        assert (await http.post(url, json={})).status_code == 401
        assert (await http.post(url, json={}, headers={"X-API-Key": KEY})).status_code == 200


WRONG = ["", "x", KEY[:-1], KEY + "x", KEY.upper(), f" {KEY}", f"{KEY} ", "tml-right-0123456788"]
OPEN = {("GET", "/api/v1/healthz")}


async def test_no_route_answers_a_wrong_key(run_service):
    """All routes, also those that do not exist, return 401 before anything else."""
    async with run_service(LocalOptions(api_key=KEY)) as client:
        app = innermost(client.service.app)
        asked = {(method, route.path) for route in app.routes for method in route.methods if method != "HEAD"}
        asked |= {("GET", "/"), ("POST", "/api/v1/no_such_route"), ("GET", "/api/v1/downloads"), ("GET", "/openapi")}
        for method, path in sorted(asked - OPEN):
            if path.startswith("/api/v1/downloads/"):
                continue  # has a signature instead
            for key in WRONG[:3]:
                answer = await client.http.request(method, path, headers={"X-API-Key": key})
                assert answer.status_code == 401, (method, path)
                assert set(answer.json()) == {"detail"}
        for key in WRONG:
            answer = await client.http.get("/api/v1/sessions", headers={"X-API-Key": key})
            assert answer.status_code == 401, key
        twice = [("X-API-Key", "wrong"), ("X-API-Key", KEY)]
        assert (await client.http.get("/api/v1/sessions", headers=twice)).status_code == 401


async def test_keys_are_compared_in_constant_time(run_service, monkeypatch):
    """Every decision about a key or a signature is `hmac.compare_digest`'s, whose time does not depend on the key."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, right: bytes) -> bool:
        compared.append((given, right))
        return hmac.compare_digest(given, right)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr("tinkex_py.local.middleware.hmac", Watched)
    async with run_service(LocalOptions(api_key=KEY)) as client:
        for key in (*WRONG, KEY):
            compared.clear()
            answer = await client.http.get("/api/v1/sessions", headers={"X-API-Key": key})
            assert compared == [(key.encode(), KEY.encode())]
            assert answer.status_code == (200 if key == KEY else 401)
    # Nothing else decides.
    monkeypatch.setattr(Watched, "compare_digest", staticmethod(lambda given, right: True))
    async with run_service(LocalOptions(api_key=KEY)) as client:
        assert (await client.http.get("/api/v1/sessions")).status_code == 200


async def test_download_addresses_open_one_file_for_a_while(run_service, monkeypatch):
    async with run_service(LocalOptions(api_key=KEY)) as client:
        client.http.headers["X-API-Key"] = KEY
        model_id = await client.model()
        await client.done("save_weights", {"model_id": model_id, "seq_id": 1, "path": "one"})
        await client.done("save_weights", {"model_id": model_id, "seq_id": 2, "path": "two"})
        told = await client.http.get(f"/api/v1/training_runs/{model_id}/checkpoints/weights/one/archive")
        link = told.headers["location"]
        del client.http.headers["X-API-Key"]
        assert (await client.http.get(link)).status_code == 200
        assert (await client.http.get(link.replace("/one/", "/two/"))).status_code == 403
        assert (await client.http.get(link[:-1] + ("0" if link[-1] != "0" else "1"))).status_code == 403
        assert (await client.http.get(link.partition("?")[0])).status_code == 403
        later = httpx.URL(link).copy_merge_params({"expires": str(10**12)})
        assert (await client.http.get(later)).status_code == 403
        monkeypatch.setattr("tinkex_py.local.checkpoints.time.time", lambda: 10**11)
        assert (await client.http.get(link)).status_code == 410


FROM_A_PAGE = [
    {"Host": "evil.example"},
    {"Host": "localhost.evil.example"},
    {"Host": "127.0.0.1.evil.example:80"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://["},
]


async def test_without_a_key_web_pages_cannot_use_it():
    async with serving(LocalOptions()) as address, httpx.AsyncClient(base_url=address) as http:
        port = httpx.URL(address).port
        for headers in FROM_A_PAGE:
            answer = await http.post("/api/v1/create_session", json={}, headers=headers)
            assert answer.status_code == 403, headers
            assert "set an api_key" in answer.json()["detail"]
        for headers in (
            {},
            {"Host": f"localhost:{port}"},
            {"Host": f"[::1]:{port}"},
            {"Origin": "http://localhost:3000"},
        ):
            assert (await http.post("/api/v1/create_session", json={}, headers=headers)).status_code == 200, headers
