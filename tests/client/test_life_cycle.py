"""Opening, closing, forgetting, and the heartbeat of a service client."""

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.client.data import datum, nll
from tests.client.recorder import http_client, http_recorder, quick_config
from tests.support.scripted_server import ScriptedServer, answer, reset, stall
from tinkex_py import AsyncServiceClient, ClientClosed, ModelInput, RetryPolicy, telemetry

DATA = [datum(3, 1)]
HEARTBEAT = "/api/v1/session_heartbeat"


def heartbeat_task() -> "asyncio.Task[Any]":
    (task,) = (task for task in asyncio.all_tasks() if task.get_name() == "tinkex.heartbeat")
    return task


def forget(holder: list[Any]) -> None:
    holder.clear()
    gc.collect()


def scripted(server: ScriptedServer, *heartbeats: Any, **settings: Any) -> AsyncServiceClient:
    """A client of a server that knows sessions only."""
    server.script("/api/v1/client/config", answer(json={}))
    server.script("/api/v1/create_session", answer(json={"session_id": "s1"}))
    server.script("/api/v1/sessions/s1/finish", answer(json={}))
    server.script(HEARTBEAT, *(heartbeats or (answer(json={}),)))
    return AsyncServiceClient(quick_config(server.url, heartbeat_interval=0.02, **settings))


@pytest.mark.asyncio
async def test_nothing_happens_before_the_first_use():
    async with ScriptedServer() as server:
        service = scripted(server)
        await asyncio.sleep(0)
        assert server.requests == []
        await service.aclose()  # never opened
        assert server.requests == []
        with pytest.raises(ClientClosed):
            await service.get_server_capabilities()


@pytest.mark.asyncio
async def test_it_works_without_a_context_manager(local_bench, caplog):
    bench = local_bench()
    training = await bench.train()
    await training.forward_backward(DATA)
    await bench.service.aclose()
    await bench.service.aclose()
    assert len(bench.recorder.of("create_session")) == 1
    assert len(bench.recorder.of("finish")) == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.asyncio
async def test_first_calls_at_the_same_time_open_one_session(local_bench):
    bench = local_bench()
    clients = await asyncio.gather(bench.train(), bench.train(), bench.train())
    assert len({client.model_id for client in clients}) == 3
    assert len(bench.recorder.of("create_session")) == 1
    await asyncio.gather(bench.service.aclose(), bench.service.aclose())
    assert len(bench.recorder.of("finish")) == 1


@pytest.mark.asyncio
async def test_every_call_after_closing_raises(local_bench):
    bench = local_bench()
    async with bench.service as service:
        training = await bench.train()
        sampler = await service.create_sampling_client(base_model="tiny")
        alone = await bench.train()
        await alone.aclose()
        await alone.aclose()
        with pytest.raises(ClientClosed):
            await alone.forward(DATA)
        await training.forward(DATA)  # the others live on
    numbered = len(bench.recorder.arrivals)
    calls = [
        lambda: training.forward(DATA),
        lambda: training.forward_backward(DATA),
        lambda: training.forward_backward_custom(DATA, nll),
        training.optim_step,
        lambda: training.save_state("x"),
        training.save_weights_and_get_sampling_client,
        training.get_info,
        training.get_tokenizer,
        lambda: service.create_lora_training_client("tiny"),
        lambda: service.create_training_client_from_state("x"),
        lambda: service.create_sampling_client(base_model="tiny"),
        service.get_server_capabilities,
        lambda: sampler.sample(ModelInput.from_ints([1])),
    ]
    for index, call in enumerate(calls):
        outcome = (await asyncio.gather(call(), return_exceptions=True))[0]
        assert isinstance(outcome, ClientClosed), (index, outcome)
    with pytest.raises(ClientClosed):
        async with service:
            pytest.fail("entered again")
    assert len(bench.recorder.arrivals) == numbered


def test_a_second_event_loop_is_refused(local_bench):
    bench = local_bench()
    with asyncio.Runner() as runner:
        training = runner.run(bench.train())
        sampler = runner.run(bench.service.create_sampling_client(base_model="tiny"))

        async def use(call: Any) -> None:
            with pytest.raises(ClientClosed, match="loop"):
                await call()

        for call in (
            bench.service.get_server_capabilities,
            bench.train,
            lambda: training.forward(DATA),
            lambda: training.forward_backward_custom(DATA, nll),
            training.optim_step,
            lambda: sampler.sample(ModelInput.from_ints([1])),
            bench.service.aclose,
            training.aclose,
        ):
            with asyncio.Runner() as other:
                other.run(use(call))
        # On its own loop it still works: the refused calls took no number.
        runner.run(asyncio.wait_for(training.forward_backward(DATA), 10))
        runner.run(bench.service.aclose())


@pytest.mark.asyncio
async def test_a_client_left_open_warns_and_its_heartbeat_ends():
    async with ScriptedServer() as server:
        service = scripted(server)
        await service.__aenter__()
        await server.until(lambda: len(server.requests_to(HEARTBEAT)) >= 2)
        http = service._http
        heartbeat = heartbeat_task()
        gone = weakref.ref(service)
        holder = [service]
        del service
        with pytest.warns(ResourceWarning, match=r"left open.*async with"):
            forget(holder)
        assert gone() is None
        async with asyncio.timeout(5):
            await heartbeat
        assert not heartbeat.cancelled()
        await http.aclose()


@pytest.mark.asyncio
async def test_the_heartbeat_survives_failures_and_tells_them():
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.session.heartbeat_failed")
    troubles = (reset(), answer(500), answer(503), answer(429), answer(200, b"no json"))
    async with ScriptedServer() as server, scripted(server, *troubles, answer(json={})):
        await server.until(lambda: len(server.requests_to(HEARTBEAT)) >= len(troubles) + 2)
        beats = server.requests_to(HEARTBEAT)
        assert beats[0].json() == {"session_id": "s1", "type": "session_heartbeat"}
        assert len({beat.body for beat in beats}) == 1
    assert len(events) >= 5, "500, 503, 429 and what is no JSON are failed heartbeats too"
    assert all(event.metadata["session_id"] == "s1" for event in events)
    assert [event.measurements["failures"] for event in events] == [1, 2, 3, 4, 5]
    silences = [event.measurements["silence"] for event in events]
    assert silences == sorted(silences)
    assert silences[0] >= 0.02  # one beat


@pytest.mark.asyncio
async def test_a_heartbeat_that_is_heard_again_ends_the_count_of_failures():
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.session.heartbeat_failed")
    troubles = (answer(503), answer(500), answer(json={}), answer(503), answer(json={}))
    async with ScriptedServer() as server, scripted(server, *troubles):
        await server.until(lambda: len(server.requests_to(HEARTBEAT)) >= len(troubles) + 1)
    assert [event.measurements["failures"] for event in events] == [1, 2, 1]


@pytest.mark.asyncio
async def test_the_heartbeat_ends_and_says_so_when_the_session_is_over():
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.session.over")
    async with ScriptedServer() as server, scripted(server, answer(json={}), answer(410)):
        async with asyncio.timeout(5):
            await asyncio.wait([heartbeat_task()])
        assert len(server.requests_to(HEARTBEAT)) == 2
    assert [event.metadata for event in events] == [{"session_id": "s1"}]


@pytest.mark.asyncio
async def test_closing_does_not_wait_for_a_heartbeat_or_a_finish_that_hang(monkeypatch):
    monkeypatch.setattr("tinkex_py.client.session._FINISH_TIMEOUT", 0.05)
    async with ScriptedServer() as server:
        service = scripted(server, stall(), timeout=600.0)
        async with service:
            await server.until(lambda: len(server.requests_to(HEARTBEAT)) == 1)
            server.script("/api/v1/sessions/s1/finish", stall())
            async with asyncio.timeout(20):
                await service.aclose()
            assert len(server.requests_to("/api/v1/sessions/s1/finish")) == 1, "it was told, and not waited for"


@pytest.mark.asyncio
async def test_closing_twice_while_the_first_closing_is_cancelled(local_bench):
    from tests.client.recorder import after

    gate = asyncio.Event()
    bench = local_bench(close_timeout=20.0)
    training = await bench.train()
    bench.recorder.always["B"] = after(gate)
    step = asyncio.create_task(training.forward_backward(DATA))
    await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 1)
    closing = asyncio.create_task(bench.service.aclose())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    closing.cancel()
    gate.set()
    await asyncio.wait([closing, step])
    await bench.service.aclose()  # nothing may be left behind: the check after every test looks
    assert closing.cancelled()
    with pytest.raises(ClientClosed):
        await training.forward_backward(DATA)


@pytest.mark.asyncio
async def test_entering_that_fails_leaves_nothing_behind():
    async with ScriptedServer() as server:
        service = scripted(server, retry=RetryPolicy(deadline=1, max_attempts=1))
        server.script("/api/v1/create_session", answer(500))
        with pytest.raises(Exception, match="500"):
            async with service:
                pytest.fail("entered")
        with pytest.raises(ClientClosed):
            await service.get_server_capabilities()


@pytest_asyncio.fixture
async def held_client() -> AsyncIterator[Any]:
    async with http_client() as (service, recorder):
        training = await service.create_lora_training_client("tiny", rank=4)
        yield training, recorder


@pytest.mark.asyncio
async def test_a_yield_fixture_may_hold_the_client(held_client):
    training, recorder = held_client
    await asyncio.gather(training.forward_backward_custom(DATA, nll), training.optim_step())
    assert recorder.kinds(training.model_id) == ["F", "B", "optim_step"]


@pytest.mark.asyncio
async def test_a_client_of_the_callers_choice_stays_the_callers(local_bench):
    import httpx

    async with http_recorder() as (recorder, url), httpx.AsyncClient() as http:
        async with AsyncServiceClient(quick_config(url), http_client=http) as service:
            training = await service.create_lora_training_client("tiny", rank=4)
            await asyncio.gather(training.forward_backward_custom(DATA, nll), training.optim_step())
        assert recorder.kinds(training.model_id) == ["F", "B", "optim_step"]
        assert not http.is_closed
