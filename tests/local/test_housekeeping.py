"""Sessions without requests and heartbeats end, and no others."""

import asyncio
import math
from collections.abc import Callable

import pytest

from tinkex_py.errors import ConfigError
from tinkex_py.local import LocalOptions

pytestmark = pytest.mark.asyncio
LIMIT = 60.0


async def until(condition: Callable[[], bool]) -> None:
    """Sends no request while it waits, because that would keep the session."""
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110  # the service sets no asyncio.Event
            await asyncio.sleep(0.005)


async def test_an_inactive_session_ends_and_one_with_a_heartbeat_stays(run_service):
    async with run_service(LocalOptions(session_timeout=2.0)) as client:
        model = await client.model()
        living = client.session_id
        silent_session = await client.session()
        silent = await client.model()
        core = client.service.core

        def over() -> bool:
            core.mark_active(model)  # as a heartbeat, or any request for the model, does
            return core.sessions[silent_session].finished

        await until(over)
        assert not core.sessions[living].finished
        assert "no request and no heartbeat" in core.sessions[silent_session].end.detail
        assert set(core.sequencers) == {model}
        beat = {"session_id": silent_session, "type": "session_heartbeat"}
        assert (await client.post("session_heartbeat", beat)).status_code == 410
        gone = await client.post("get_info", {"model_id": silent})
        assert gone.status_code == 404
        assert "its session ended" in gone.json()["detail"]
        assert (await client.post("get_info", {"model_id": model})).status_code == 200


async def test_reading_a_session_does_not_keep_it(run_service):
    async with run_service(LocalOptions(session_timeout=None)) as client:
        session_id = await client.session()
        core = client.service.core
        core.take_active_sessions()
        assert (await client.http.get(f"/api/v1/sessions/{session_id}")).status_code == 200
        assert core.take_active_sessions() == set()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "path",
    ["session_heartbeat", "get_info", "optim_step", "forward", "create_sampling_session", "retrieve_futures"],
)
async def test_every_request_marks_its_session_as_active(shared, path, kit):
    await shared.session()
    model_id = await shared.model()
    core = shared.service.core
    sampler = {"session_id": shared.session_id, "sampling_session_seq_id": 1, "base_model": "tiny"}
    sampler_id = (await shared.ask("create_sampling_session", sampler))["sampling_session_id"]
    core.take_active_sessions()
    assert core.take_active_sessions() == set()
    if path == "forward":
        await shared.send_pass(kit.message(model_id, 1, [kit.datum(3, 1)]))
    else:
        body = {
            "session_heartbeat": {"session_id": shared.session_id, "type": "session_heartbeat"},
            "get_info": {"model_id": model_id},
            "optim_step": {"model_id": model_id, "seq_id": 1, "adam_params": {"learning_rate": 0.1}},
            "create_sampling_session": {**sampler, "sampling_session_seq_id": 0},
            "retrieve_futures": {"target": {"sampling_session_id": sampler_id}, "timeout": 0},
        }[path]
        assert (await shared.post(path, body)).status_code == 200
    assert core.take_active_sessions() == {shared.session_id}


async def test_a_blocked_event_loop_ends_no_session(run_service, monkeypatch):
    async with run_service(LocalOptions(session_timeout=3600.0)) as client:
        session_id = await client.session()
        core = client.service.core
        core.mark_active("seen by the next look")
        loop = asyncio.get_running_loop()
        before = loop.time
        monkeypatch.setattr(loop, "time", lambda: before() + 7200.0)  # as after a notebook's cell that computes
        await until(lambda: not core._active)
        beat = {"session_id": session_id, "type": "session_heartbeat"}
        assert (await client.post("session_heartbeat", beat)).status_code == 200


async def test_without_a_timeout_sessions_are_not_checked(run_service):
    async with run_service(LocalOptions(session_timeout=None)):
        assert "tinkex.local.sessions" not in {task.get_name() for task in asyncio.all_tasks()}


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan, math.inf, True, "60"])
async def test_an_invalid_timeout_is_refused(timeout):
    with pytest.raises(ConfigError, match="session_timeout"):
        LocalOptions(session_timeout=timeout)
