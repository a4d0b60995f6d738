"""Many samples are waited for with one poll, where the service says that it can."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from tests.client.recorder import quick_config
from tests.support.scripted_server import Behaviour, Request, ScriptedServer, answer, computed
from tinkex_py import AsyncServiceClient, ClientClosed, ModelInput, PermissionDenied, SamplingParams
from tinkex_py.client.sampling import AsyncSamplingClient

pytestmark = pytest.mark.asyncio
POLLS, RESULTS = "/api/v1/retrieve_futures", "/api/v1/retrieve_future"
PROMPT = ModelInput.from_ints([5, 6, 7])
ONE = SamplingParams(max_tokens=1, stop=[])


class Service:
    """Finishes samples on demand, and keeps the events until they are acknowledged."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.events: list[str] = []
        self.freed: list[str] = []
        self.news = asyncio.Event()
        self.submitted = 0
        server.script("/api/v1/client/config", answer(json={"sample_use_retrieve_futures": True}))
        server.script("/api/v1/create_session", answer(json={"session_id": "s"}))
        server.script("/api/v1/create_sampling_session", answer(json={"sampling_session_id": "draws"}))
        server.script("/api/v1/asample", computed(self.submit))
        server.script(RESULTS, computed(self.result))
        server.script(POLLS, self.poll)

    def finish(self, *request_ids: str) -> None:
        self.events += request_ids
        self.news.set()

    def submit(self, _request: Request) -> Behaviour:
        self.submitted += 1
        return answer(json={"request_id": f"r{self.submitted}"})

    def result(self, request: Request) -> Behaviour:
        assert request.json()["request_id"] in self.events
        return answer(json={"sequences": [{"tokens": [1], "logprobs": [-0.5], "stop_reason": "length"}]})

    @property
    def poll(self) -> Behaviour:
        async def act(exchange: Any) -> None:
            asked = exchange.request.json()
            assert asked["target"] == {
                "type": "sampling_session",
                "sampling_session_id": "draws",
                "cloned_sampler_id": 0,
            }
            self.freed += asked["retrieved_request_ids"]
            cursor = asked["prev_cursor"]
            while "timeout" not in asked and len(self.events) <= cursor:
                self.news.clear()
                await self.news.wait()
            events = [{"state": "finished", "request_id": name} for name in self.events[cursor:]]
            await answer(json={"completions": events, "cursor": len(self.events)}).act(exchange)

        return Behaviour(act)

    async def until_submitted(self, count: int) -> None:
        await self.server.until(lambda: self.submitted == count and bool(self.server.requests_to(POLLS)))


@pytest_asyncio.fixture
async def scripted() -> AsyncIterator[Service]:
    async with ScriptedServer() as server:
        yield Service(server)


@asynccontextmanager
async def sampling(scripted: Service) -> AsyncIterator[AsyncSamplingClient]:
    async with AsyncServiceClient(quick_config(scripted.server.url)) as service:
        yield await service.create_sampling_client(base_model="tiny")


async def test_one_poll_waits_for_all_and_every_result_is_fetched_once(scripted):
    server = scripted.server
    async with sampling(scripted) as sampler:
        samples = [asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE)) for _ in range(20)]
        await scripted.until_submitted(20)
        assert len(server.requests_to(POLLS)) == 1
        assert not server.requests_to(RESULTS)
        scripted.finish(*(f"r{number}" for number in range(1, 11)))
        await asyncio.wait(samples[:10])
        assert not any(sample.done() for sample in samples[10:])
        scripted.finish(*(f"r{number}" for number in range(11, 21)))
        await asyncio.gather(*samples)
        await server.until(lambda: len(scripted.freed) >= 20)
    assert len(server.requests_to(RESULTS)) == 20
    assert sorted(scripted.freed) == sorted(f"r{number}" for number in range(1, 21))


async def test_a_poll_that_failed_is_sent_again_with_the_same_ids(scripted):
    server = scripted.server
    server.script(POLLS, answer(500, json={}), answer(400, json={}), scripted.poll)
    async with sampling(scripted) as sampler:
        sample = asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE))
        await server.until(lambda: len(server.requests_to(POLLS)) == 3)
        scripted.finish("r1")
        await sample
        bodies = {request.body for request in server.requests_to(POLLS)[:3]}
    assert len(bodies) == 1


async def test_a_service_without_the_endpoint_is_polled_for_each_sample(scripted):
    server = scripted.server
    scripted.finish("r1", "r2")
    server.script(POLLS, answer(404, json={"detail": "no such route"}))
    async with sampling(scripted) as sampler:
        for _ in range(2):
            await sampler.sample(PROMPT, sampling_params=ONE)
    assert len(server.requests_to(POLLS)) == 1


async def test_a_final_refusal_ends_every_sample_that_waits(scripted):
    server = scripted.server
    refused = asyncio.Event()

    async def refuse(exchange: Any) -> None:
        await refused.wait()
        await answer(403, json={"detail": "not yours"}).act(exchange)

    server.script(POLLS, Behaviour(refuse))
    async with sampling(scripted) as sampler:
        samples = [asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE)) for _ in range(3)]
        await scripted.until_submitted(3)
        refused.set()
        for sample in samples:
            with pytest.raises(PermissionDenied):
                await sample


async def test_a_cancelled_sample_leaves_the_others_waiting(scripted):
    async with sampling(scripted) as sampler:
        samples = [asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE)) for _ in range(2)]
        await scripted.until_submitted(2)
        samples[0].cancel()
        await asyncio.wait(samples[:1])
        scripted.finish("r1", "r2")
        await samples[1]
        assert samples[0].cancelled()


async def test_closing_the_service_client_ends_the_wait(scripted):
    async with sampling(scripted) as sampler:
        sample = asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE))
        await scripted.until_submitted(1)
    with pytest.raises(ClientClosed):
        await sample


async def test_polls_that_are_not_held_are_paced(scripted):
    server = scripted.server
    empty = answer(json={"completions": [], "cursor": 0})
    server.script(POLLS, empty, empty, empty, scripted.poll)
    scripted.finish("r1")
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with sampling(scripted) as sampler:
        await sampler.sample(PROMPT, sampling_params=ONE)
    assert loop.time() - started >= 0.05 + 0.1 + 0.2


@pytest.mark.parametrize("body", [{}, {"completions": 3, "cursor": 0}, {"completions": [], "cursor": True}, []])
async def test_an_invalid_response_is_requested_again(scripted, body: Any):
    server = scripted.server
    server.script(POLLS, answer(json=body), scripted.poll)
    scripted.finish("r1")
    async with sampling(scripted) as sampler:
        await sampler.sample(PROMPT, sampling_params=ONE)
    assert len(server.requests_to(POLLS)) == 2
