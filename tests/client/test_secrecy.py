"""The key is sent in its header and shows nowhere else."""

import contextlib
import logging
import pickle
import traceback
from typing import Any

import pytest
import structlog

from tests.support.scripted_server import ScriptedServer, answer, computed, half_a_body, reset
from tinkex_py import (
    AsyncServiceClient,
    ConfigError,
    RetryPolicy,
    TinkexConfig,
    TinkexError,
    telemetry,
)

pytestmark = pytest.mark.asyncio
KEY = "tml-PLANTED-0123456789abcdef"
RETRY = RetryPolicy(deadline=2, max_attempts=2, initial_wait=0.0, max_wait=0.01)


def everything_about(error: BaseException | None) -> str:
    """All text that a person or a log could see of an error and of its causes."""
    texts: list[str] = []
    while error is not None:
        texts += [str(error), repr(error), repr(error.__dict__), repr(error.args)]
        texts += traceback.format_exception(error, limit=None, chain=True)
        texts.append(repr(getattr(error, "doc", None)))  # json's own error quotes the whole body here
        if isinstance(error, TinkexError):
            texts.append(repr(pickle.dumps(error)))
        else:
            with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
                texts.append(repr(pickle.dumps(error)))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def echoing(status: int) -> Any:
    """An error answer that quotes all request headers."""
    return computed(
        lambda request: answer(
            status,
            json={"detail": f"bad key {request.headers.get('x-api-key')}", "headers": dict(request.headers)},
            headers={"x-request-id": request.headers.get("x-api-key", "")},
        )
    )


def echoing_text(status: int) -> Any:
    return computed(lambda request: answer(status, f"<p>{request.headers.get('x-api-key')}</p>".encode()))


TROUBLES = [*(echoing(status) for status in (400, 401, 403, 409, 422, 429, 500)), echoing_text(502), reset()]


async def failures(server: ScriptedServer) -> list[BaseException]:
    caught: list[BaseException] = []
    for trouble in [*TROUBLES, half_a_body(b"{}"), answer(200, b"not json"), echoing_text(200), answer(200, json=[1])]:
        server.script("/api/v1/client/config", trouble)
        try:
            async with AsyncServiceClient(TinkexConfig(base_url=server.url, api_key=KEY, retry=RETRY)):
                pytest.fail("this cannot be entered")
        except TinkexError as error:
            caught.append(error)
    return caught


async def test_no_error_log_or_event_has_the_key(caplog):
    events: list[Any] = []
    telemetry.attach(events.append)
    caplog.set_level(logging.DEBUG)
    async with ScriptedServer() as server:
        with structlog.testing.capture_logs() as lines:
            caught = await failures(server)
        assert all(request.headers["x-api-key"] == KEY for request in server.requests)
        assert all(KEY not in str(request.target) and KEY.encode() not in request.body for request in server.requests)
    assert len(caught) == len(TROUBLES) + 4
    assert events
    for error in caught:
        assert KEY not in everything_about(error), type(error)
    assert KEY not in repr(events)
    assert KEY not in repr(lines)
    # At DEBUG, HTTP libraries log the headers of answers; what this server echoes there is beyond our reach.
    ours = [record for record in caplog.records if record.name.startswith("tinkex") or record.levelno >= logging.INFO]
    assert KEY not in repr([(record.getMessage(), record.__dict__) for record in ours])


async def test_no_object_shows_the_key():
    config = TinkexConfig(base_url="http://127.0.0.1:1", api_key=KEY)
    service = AsyncServiceClient(config)
    for thing in (config, service, service._session, service._api, service._http, service.__dict__, vars(config)):
        assert KEY not in repr(thing)
        assert KEY not in str(thing)
        assert KEY not in f"{thing}"
    assert KEY.encode() not in pickle.dumps(config.api_key)
    await service.aclose()


FAILED_WORK = [
    answer(json={"error": f"refused for {KEY}", "category": "user"}),
    answer(json={"status": "completed", "result": {"error": f"{KEY}"}}),
    answer(400, json={"detail": f"no future for {KEY}"}),
    answer(400, f"no future for {KEY}".encode()),
    answer(404, json={"detail": f"no future for {KEY}"}),
    answer(410, json={"detail": f"gone {KEY}"}),
]


@pytest.mark.parametrize("poll", FAILED_WORK)
async def test_failures_of_work_do_not_quote_the_key(caplog, poll):
    caplog.set_level(logging.DEBUG)
    async with ScriptedServer() as server:
        server.script("/api/v1/client/config", answer(json={}))
        server.script("/api/v1/create_session", answer(json={"session_id": "s"}))
        server.script("/api/v1/create_model", answer(json={"request_id": "r1"}))
        server.script("/api/v1/sessions/s/finish", answer(json={}))
        server.script("/api/v1/retrieve_future", poll)
        async with AsyncServiceClient(TinkexConfig(base_url=server.url, api_key=KEY, retry=RETRY)) as service:
            with pytest.raises(TinkexError) as caught:
                await service.create_lora_training_client("tiny")
    assert KEY not in everything_about(caught.value)
    assert KEY not in caplog.text


async def test_a_key_in_the_address_is_refused_without_showing_it():
    for url in (f"http://user:{KEY}@127.0.0.1:1", f"http://127.0.0.1:1/?key={KEY}", f"http://127.0.0.1:1/#{KEY}"):
        with pytest.raises(ConfigError) as caught:
            AsyncServiceClient(TinkexConfig(base_url=url, api_key="tml-x"))
        assert KEY not in str(caught.value)
        assert "base_url" in str(caught.value)
