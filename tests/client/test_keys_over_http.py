"""Keys and headers on their way: what arrives at a real server, and what shows anywhere else."""

import asyncio
import json
import logging
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from tests.client.test_secrecy import everything_about
from tests.support.scripted_server import Request, ScriptedServer, answer, computed
from tests.transport.test_auth import jwt
from tinkex_py import AsyncServiceClient, Authentication, ConfigError, RetryPolicy, TinkexConfig, TinkexError, telemetry

pytestmark = pytest.mark.asyncio
KEY = "tml-PLANTED-0123456789abcdef"
RETRY = RetryPolicy(deadline=5.0, initial_wait=0.0, max_wait=0.01)
CAPABILITIES = "/api/v1/get_server_capabilities"
TOKEN = "/api/v1/auth/token"


def config(server: ScriptedServer, **settings: Any) -> TinkexConfig:
    return TinkexConfig(**{"base_url": server.url, "retry": RETRY, **settings})


class Issuer:
    """The token endpoint, and everything else that accepts its latest token only."""

    def __init__(self, server: ScriptedServer, **flags: Any) -> None:
        self.server = server
        self.valid = ""
        self.count = 0
        server.script("/api/v1/client/config", answer(json={"pjwt_auth_enabled": True, **flags}))
        server.script("/api/v1/create_session", self.checked({"session_id": "s"}))
        server.script("/api/v1/session_heartbeat", self.checked({}))
        server.script("/api/v1/sessions/s/finish", self.checked({}))
        server.script(CAPABILITIES, self.checked({"supported_models": []}))
        server.script(TOKEN, computed(self.issue))

    def issue(self, request: Request) -> Any:
        self.count += 1
        self.valid = jwt(exp=time.time() + 3600, number=self.count)
        return answer(json={"jwt": self.valid})

    def checked(self, body: Any) -> Any:
        def check(request: Request) -> Any:
            if request.headers["x-api-key"] == self.valid:
                return answer(json=body)
            told = {"www-authenticate": 'Bearer error="invalid_token"'}
            return answer(401, json={"detail": f"not {request.headers['x-api-key']}"}, headers=told)

        return computed(check)


async def test_the_key_is_exchanged_once_and_the_token_goes_with_everything():
    async with ScriptedServer() as server:
        issuer = Issuer(server)
        async with AsyncServiceClient(config(server, api_key=KEY)) as service:
            await asyncio.gather(*(service.get_server_capabilities() for _ in range(5)))
            assert issuer.count == 1
            first = server.requests[0]
            assert (first.path, first.headers["x-api-key"]) == ("/api/v1/client/config", KEY)
            assert (server.requests[1].path, server.requests[1].headers["x-api-key"]) == (TOKEN, KEY)
            assert server.requests[1].json() == {}
            assert {one.headers["x-api-key"] for one in server.requests[2:]} == {issuer.valid}
        assert server.requests[-1].path.endswith("finish")


async def test_a_rejected_token_is_replaced_and_the_request_sent_once_more():
    async with ScriptedServer() as server:
        issuer = Issuer(server)
        async with AsyncServiceClient(config(server, api_key=KEY)) as service:
            issuer.valid = "the service forgot it"
            await asyncio.gather(*(service.get_server_capabilities() for _ in range(5)))
            assert issuer.count == 2


async def test_a_token_that_is_never_right_is_a_final_error():
    async with ScriptedServer() as server:
        issuer = Issuer(server)
        async with AsyncServiceClient(config(server, api_key=KEY)) as service:
            told = {"www-authenticate": 'Bearer error="invalid_token"'}
            server.script(CAPABILITIES, answer(401, json={"detail": "no"}, headers=told))
            with pytest.raises(Authentication):
                await service.get_server_capabilities()
            assert len(server.requests_to(CAPABILITIES)) == 2
            server.script(CAPABILITIES, answer(401, json={"detail": "no"}))
            with pytest.raises(Authentication):
                await service.get_server_capabilities()
            assert len(server.requests_to(CAPABILITIES)) == 3, "without the marker it is final at once"
            assert issuer.count == 2


async def test_a_key_that_is_refused_by_the_exchange():
    async with ScriptedServer() as server:
        Issuer(server)
        server.script(TOKEN, answer(401, json={"detail": f"unknown key {KEY}"}))
        with pytest.raises(Authentication) as caught:
            await AsyncServiceClient(config(server, api_key=KEY)).__aenter__()
        assert KEY not in everything_about(caught.value)


async def test_the_key_of_a_command(monkeypatch):
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"echo {KEY}")
    async with ScriptedServer() as server:
        issuer = Issuer(server)
        settings = config(server)
        assert KEY not in repr(settings) + repr(vars(settings))
        assert KEY.encode() not in pickle.dumps(settings)
        async with AsyncServiceClient(settings) as service:
            await service.get_server_capabilities()
        assert server.requests_to(TOKEN)[0].headers["x-api-key"] == KEY
        assert issuer.count == 1
        server.script("/api/v1/client/config", answer(json={}))
        with pytest.raises(ConfigError, match="TINKER_API_KEY") as caught:
            await AsyncServiceClient(config(server)).__aenter__()
        assert KEY not in everything_about(caught.value)


def home_with_key(monkeypatch: pytest.MonkeyPatch, folder: Path, key: str) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / ".tinker").mkdir()
    entry = {"type": "manual", "key": key, "name": "n"}
    content = {"version": 1, "default": "k", "keys": {"k": entry}}
    (folder / ".tinker" / "credentials.json").write_text(json.dumps(content))


async def test_sources_in_their_order(monkeypatch, tmp_path):
    home_with_key(monkeypatch, tmp_path, "tml-from-file")
    base = {"base_url": "http://127.0.0.1:1"}
    assert TinkexConfig(**base).key == "tml-from-file"
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "echo tml-from-command")
    assert TinkexConfig(**base).key == ""
    monkeypatch.setenv("TINKER_API_KEY", "tml-from-environment")
    assert TinkexConfig(**base).key == "tml-from-environment"
    assert TinkexConfig(**base, api_key="tml-given").key == "tml-given"


async def test_headers_and_labels_of_the_environment(monkeypatch):
    monkeypatch.setenv("TINKER_TAGS", "one, two ,,three")
    monkeypatch.setenv("TINKER_PROJECT_ID", "project")
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_ID", "access-id")
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", "access-PLANTED-secret")
    async with ScriptedServer() as server:
        server.script("/api/v1/client/config", answer(json={}))
        server.script("/api/v1/create_session", answer(json={"session_id": "s"}))
        server.script("/api/v1/sessions/s/finish", answer(json={}))
        settings = config(server, api_key=KEY, default_headers={"X-Team": "blue", "User-Agent": "mine"})
        async with AsyncServiceClient(settings):
            pass
        assert len(server.requests) == 3
        for request in server.requests:
            assert request.headers["cf-access-client-id"] == "access-id"
            assert request.headers["cf-access-client-secret"] == "access-PLANTED-secret"
            assert request.headers["x-team"] == "blue"
            assert request.headers["user-agent"] == "mine"
            assert request.headers["x-api-key"] == KEY
        body = server.requests_to("/api/v1/create_session")[0].json()
        assert sorted(body["tags"]) == ["one", "three", "two"]
        assert body["project_id"] == "project"
    assert TinkexConfig(base_url="http://x", api_key=KEY, tags=["mine"]).tags == ("mine",)


@pytest.mark.parametrize("headers", [{"X-Bad": "line\nbreak"}, {"bad name": "x"}, {"X": 3}, [("X", "y")], {"X": "é"}])
async def test_headers_that_cannot_be_sent(headers):
    with pytest.raises(ConfigError, match="default_headers"):
        TinkexConfig(base_url="http://x", api_key=KEY, default_headers=headers)


async def test_no_token_secret_or_header_shows_anywhere(monkeypatch, caplog):
    """The service echoes all headers in its errors; the log is at DEBUG."""
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", "access-PLANTED-secret")
    events: list[Any] = []
    telemetry.attach(events.append)
    caplog.set_level(logging.DEBUG, logger="tinkex_py")
    async with ScriptedServer() as server:
        issuer = Issuer(server)
        settings = config(server, api_key=KEY, default_headers={"Authorization": "Bearer PLANTED-for-a-proxy"})
        async with AsyncServiceClient(settings) as service:
            server.script(
                CAPABILITIES,
                computed(lambda request: answer(400, json={"detail": str(request.headers), **request.headers})),
            )
            with pytest.raises(TinkexError) as caught:
                await service.get_server_capabilities()
            secrets = [KEY, issuer.valid, "access-PLANTED-secret", "PLANTED-for-a-proxy"]
            shown = everything_about(caught.value) + repr(settings) + repr(vars(settings).get("api_key"))
            shown += repr(service) + repr(service.__dict__) + repr(events) + caplog.text
    for secret in secrets:
        assert secret not in shown
    assert "[redacted]" in str(caught.value.body)
