"""Odd bytes as the answer to every call, over real sockets: each is one typed error, and the client can be closed."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.client.data import datum, nll
from tests.support.scripted_server import Behaviour, ScriptedServer, answer, half_a_body, raw, reset
from tinkex_py import AsyncServiceClient, ModelInput, RetryPolicy, TinkexConfig, TinkexError

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


class Service:
    """A service whose answers are right but for one."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        right: dict[str, Behaviour] = {
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
        for path, behaviour in right.items():
            server.script(f"/api/v1/{path}", behaviour)

    def spoil(self, path: str, behaviour: Behaviour) -> None:
        self.server.script(f"/api/v1/{path}", behaviour)


async def train(service: AsyncServiceClient) -> Any:
    return await service.create_lora_training_client("m")


async def sampler(service: AsyncServiceClient) -> Any:
    return await service.create_sampling_client(base_model="m")


async def _forward(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    training = await train(service)
    spoil()
    await training.forward(DATA)


async def _custom(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    training = await train(service)
    spoil()
    await training.forward_backward_custom(DATA, nll)


async def _step(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    training = await train(service)
    spoil()
    await training.optim_step()


async def _save(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    training = await train(service)
    spoil()
    await training.save_state("name")


async def _info(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    training = await train(service)
    spoil()
    await training.get_info()


async def _sample(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    drawing = await sampler(service)
    spoil()
    await drawing.sample(ModelInput.from_ints([1]))


async def _create(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    spoil()
    await train(service)


async def _open(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    spoil()
    await service.get_server_capabilities()


async def _open_sampler(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    spoil()
    await sampler(service)


async def _from_state(service: AsyncServiceClient, spoil: Callable[[], None]) -> None:
    spoil()
    await service.create_training_client_from_state("tinker://m/weights/x")


Call = Callable[[AsyncServiceClient, Callable[[], None]], Awaitable[None]]
CALLS: dict[str, tuple[Call, str]] = {
    "config": (_open, "client/config"),
    "session": (_open, "create_session"),
    "capabilities": (_open, "get_server_capabilities"),
    "create": (_create, "create_model"),
    "the result of create": (_create, "retrieve_future"),
    "forward": (_forward, "forward_backward"),
    "the result of forward": (_forward, "retrieve_future"),
    "the forward of a custom step": (_custom, "forward_backward"),
    "its result": (_custom, "retrieve_future"),
    "optim_step": (_step, "optim_step"),
    "save": (_save, "save_weights"),
    "the result of save": (_save, "retrieve_future"),
    "info": (_info, "get_info"),
    "sampling session": (_open_sampler, "create_sampling_session"),
    "sample": (_sample, "asample"),
    "the result of sample": (_sample, "retrieve_future"),
    "from state": (_from_state, "load_weights"),
    "what is in a checkpoint": (_from_state, "weights_info"),
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
    call, path = CALLS[name]
    async with ScriptedServer() as server:
        for odd, behaviour in ODD.items():
            scripted = Service(server)
            service = AsyncServiceClient(
                TinkexConfig(base_url=server.url, api_key="tml-x", retry=RETRY, timeout=5.0, close_timeout=1.0)
            )

            def spoil(scripted: Service = scripted, behaviour: Behaviour = behaviour) -> None:
                scripted.spoil(path, behaviour)

            failure: BaseException | None = None
            try:
                await call(service, spoil)
            except TinkexError as error:
                failure = error
            finally:
                await service.aclose()
            assert (failure is None) == ((name, odd) in HARMLESS), (odd, failure)
