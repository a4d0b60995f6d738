"""Odd bytes as the answer to every call, over real sockets: each is one typed error, and the client can be closed."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.client.data import datum, nll
from tests.support.scripted_server import Behaviour, ScriptedServer, answer, half_a_body, raw, reset
from tinkex_py import AsyncServiceClient, ModelInput, RetryPolicy, TinkexConfig, TinkexError
from tinkex_py.client import AsyncSamplingClient, AsyncTrainingClient

pytestmark = pytest.mark.asyncio
RETRY = RetryPolicy(deadline=5.0, max_attempts=1, initial_wait=0.0, max_wait=0.0)
DATA = [datum(3, 1)]
PROTOBUF = {"content-type": "application/x-protobuf"}

ODD: dict[str, Behaviour] = {
    "nothing": answer(200),
    "a page": answer(200, b"<html>hello</html>", headers={"content-type": "text/html"}),
    "no text": answer(200, bytes(range(256))),
    "half of an object": answer(200, b'{"request_id": "1', headers={"content-type": "application/json"}),
    "a list": answer(json=[1, 2]),
    "null": answer(json=None, body=b"null"),
    "ids that are no texts": answer(json={"request_id": {"a": 1}, "session_id": [], "sampling_session_id": 3}),
    "ids that cannot be sent": answer(
        200,
        b'{"request_id": "\\ud800", "session_id": "a\\u0000b", "sampling_session_id": "\\n", "model_id": "\\ud800"}',
    ),
    "deeper than a parser goes": answer(200, b"[" * 100_000),
    "protobuf of nothing known": answer(200, b"\xff\xff\xff\xff", headers=PROTOBUF),
    "not http": raw(b"\x00\x01\x02 what is this\r\n\r\n"),
    "a connection that breaks": reset(),
    "a body that breaks": half_a_body(b'{"request_id": "1"}'),
    "gzip that is none": answer(200, b"plain", headers={"content-encoding": "gzip"}),
    "a redirect to nowhere": answer(302, headers={"location": "http://["}),
    "a status from elsewhere": answer(299, b"\x80"),
    "an error without sense": answer(418, b"\x00\xff", headers={"retry-after": "-\x7f"}),
}


RIGHT: dict[str, Behaviour] = {
    "client/config": answer(json={"proto_write_fwdbwd": True}),
    "create_session": answer(json={"session_id": "s"}),
    "sessions/s/finish": answer(json={}),
    "get_server_capabilities": answer(json={}),
    "create_model": answer(json={"request_id": "1"}),
    "retrieve_future": answer(json={"model_id": "m"}),
    "create_sampling_session": answer(json={"sampling_session_id": "d"}),
    "asample": answer(json={"request_id": "2"}),
    "load_weights": answer(404),
    "weights_info": answer(json={"base_model": "m"}),
    "get_info": answer(json={"model_id": "m", "model_data": {}}),
    **{name: answer(json={"request_id": "3"}) for name in ("forward_backward", "optim_step", "save_weights")},
}


def script_right_answers(server: ScriptedServer) -> None:
    for path, behaviour in RIGHT.items():
        server.script(f"/api/v1/{path}", behaviour)


async def connected(service: AsyncServiceClient) -> AsyncServiceClient:
    return service


async def train(service: AsyncServiceClient) -> AsyncTrainingClient:
    return await service.create_lora_training_client("m")


async def sampler(service: AsyncServiceClient) -> AsyncSamplingClient:
    return await service.create_sampling_client(base_model="m")


def forward(training: AsyncTrainingClient) -> Awaitable[Any]:
    return training.forward(DATA)


def custom(training: AsyncTrainingClient) -> Awaitable[Any]:
    return training.forward_backward_custom(DATA, nll)


def save(training: AsyncTrainingClient) -> Awaitable[Any]:
    return training.save_state("name")


def sample(drawing: AsyncSamplingClient) -> Awaitable[Any]:
    return drawing.sample(ModelInput.from_ints([1]))


def from_state(service: AsyncServiceClient) -> Awaitable[Any]:
    return service.create_training_client_from_state("tinker://m/weights/x")


# What is prepared with right answers, the call, and the path whose answer is odd.
CALLS: dict[str, tuple[Callable[[AsyncServiceClient], Awaitable[Any]], Callable[[Any], Awaitable[Any]], str]] = {
    "config": (connected, AsyncServiceClient.get_server_capabilities, "client/config"),
    "session": (connected, AsyncServiceClient.get_server_capabilities, "create_session"),
    "capabilities": (connected, AsyncServiceClient.get_server_capabilities, "get_server_capabilities"),
    "create": (connected, train, "create_model"),
    "the result of create": (connected, train, "retrieve_future"),
    "forward": (train, forward, "forward_backward"),
    "the result of forward": (train, forward, "retrieve_future"),
    "the forward of a custom step": (train, custom, "forward_backward"),
    "its result": (train, custom, "retrieve_future"),
    "optim_step": (train, AsyncTrainingClient.optim_step, "optim_step"),
    "save": (train, save, "save_weights"),
    "the result of save": (train, save, "retrieve_future"),
    "info": (train, AsyncTrainingClient.get_info, "get_info"),
    "sampling session": (connected, sampler, "create_sampling_session"),
    "sample": (sampler, sample, "asample"),
    "the result of sample": (sampler, sample, "retrieve_future"),
    "from state": (connected, from_state, "load_weights"),
    "what is in a checkpoint": (connected, from_state, "weights_info"),
}
# Where an answer without anything in it says enough.
HARMLESS = {
    ("config", "nothing"),
    ("config", "ids that are no texts"),
    ("config", "ids that cannot be sent"),
    ("capabilities", "nothing"),
    ("capabilities", "ids that are no texts"),
    ("capabilities", "ids that cannot be sent"),
}


@pytest.mark.parametrize("name", CALLS)
async def test_odd_answers(name):
    prepare, call, path = CALLS[name]
    config = {"api_key": "tml-x", "retry": RETRY, "timeout": 5.0, "close_timeout": 1.0}
    async with ScriptedServer() as server:
        for odd, behaviour in ODD.items():
            script_right_answers(server)
            service = AsyncServiceClient(TinkexConfig(base_url=server.url, **config))
            prepared = await prepare(service)
            server.script(f"/api/v1/{path}", behaviour)
            failure: TinkexError | None = None
            try:
                await call(prepared)
            except TinkexError as error:
                failure = error
            finally:
                await service.aclose()
            assert (failure is None) == ((name, odd) in HARMLESS), (odd, failure)
