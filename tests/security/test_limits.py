"""What waits at the embedded service is bounded; refused clients are asked to retry."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.client.data import datum, nll
from tests.client.recorder import QUICK
from tinkex_py import AsyncServiceClient, ConfigError, TinkexConfig
from tinkex_py.local import LocalOptions
from tinkex_py.local.admission import Admission

pytestmark = pytest.mark.asyncio


@contextmanager
def busy_engine(client: Any) -> Iterator[None]:
    """The engine finishes nothing while the block runs."""
    go_on = threading.Event()
    client.service.core.submit(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


def step(model_id: str, number: int) -> dict[str, Any]:
    return {"model_id": model_id, "seq_id": number, "adam_params": {}}


def check_refusal(answer: Any) -> None:
    assert answer.status_code == 429, answer.text
    assert answer.headers["retry-after"] == "1"
    assert "retry in a second" in answer.json()["detail"]


async def test_a_full_queue_answers_429_and_the_number_stays_free(run_service, kit):
    async with run_service(LocalOptions(max_waiting_requests=3)) as client:
        model_id = await client.model()
        with busy_engine(client):
            first = [(await client.ask("optim_step", step(model_id, number)))["request_id"] for number in (1, 2)]
            check_refusal(await client.post("optim_step", step(model_id, 3)))
            # What is in the queue is still the same request when it is sent again, and other models wait too.
            assert (await client.ask("optim_step", step(model_id, 2)))["request_id"] == first[1]
            body = {"session_id": client.session_id, "model_seq_id": 1, "base_model": "tiny"}
            check_refusal(await client.post("create_model", body))
            check_refusal(await client.post("optim_step", {**step(model_id, 0), "seq_id": 0}))
            check_refusal(await client.send_pass(kit.message(model_id, 3, [kit.datum(3, 1)])))
        for request_id in first:
            assert "metrics" in (await client.final(request_id)).json()
        assert "metrics" in await client.done("optim_step", step(model_id, 3))
        assert (await client.done("create_model", body))["model_id"]
        core = client.service.core
        assert (core._queued.requests, core._queued.bytes) == (0, 0)


async def test_what_waits_for_an_earlier_number_is_bounded_and_never_keeps_that_number_out(run_service):
    async with run_service(LocalOptions(max_waiting_requests=3)) as client:
        model_id = await client.model()
        late = [(await client.ask("optim_step", step(model_id, number)))["request_id"] for number in (4, 3, 2)]
        check_refusal(await client.post("optim_step", step(model_id, 5)))
        assert "metrics" in await client.done("optim_step", step(model_id, 1))
        for request_id in late:
            assert "metrics" in (await client.final(request_id)).json()
        assert "metrics" in await client.done("optim_step", step(model_id, 5))
        # Unloading lets go of what will never start.
        for number in (7, 8, 9):
            await client.ask("optim_step", step(model_id, number))
        check_refusal(await client.post("optim_step", step(model_id, 10)))
        await client.done("unload_model", {"model_id": model_id})
        core = client.service.core
        assert (core._held.requests, core._held.bytes) == (0, 0)


async def test_bytes_that_wait_are_bounded_and_one_large_request_is_not_shut_out(run_service, kit):
    async with run_service(LocalOptions(max_waiting_bytes=1000)) as client:
        model_id = await client.model()
        large = [kit.datum(400, 1)]
        assert len(kit.message(model_id, 1, large).SerializeToString()) > 1000
        with busy_engine(client):
            first = await client.send_pass(kit.message(model_id, 1, large))
            assert first.status_code == 200
            check_refusal(await client.send_pass(kit.message(model_id, 2, [kit.datum(3, 1)])))
            check_refusal(await client.post("optim_step", step(model_id, 2)))
        await client.final(first.json()["request_id"])
        assert (await client.send_pass(kit.message(model_id, 2, large))).status_code == 200


async def test_models_are_bounded(run_service):
    async with run_service(LocalOptions(max_models=2)) as client:
        models = [await client.model(number) for number in range(2)]
        body = {"session_id": client.session_id, "model_seq_id": 2, "base_model": "tiny"}
        for path, fields in (("create_model", body), ("load_weights", {**body, "path": "tinker://a/weights/b"})):
            answer = await client.post(path, fields)
            assert answer.status_code == 429
            assert "2 training models are loaded already" in answer.json()["detail"]
        assert await client.model(1) == models[1]
        await client.done("unload_model", {"model_id": models[0]})
        assert await client.model(2)


async def test_this_client_retries_after_429(monkeypatch):
    """A full queue only delays this client; the numbers are the same."""

    async def losses() -> list[float]:
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        found = []
        for seed in range(3):
            found.append((await training.forward_backward_custom([datum(4, seed)], nll)).loss_total)
            await training.optim_step()
        return found

    asked: list[int] = []
    original = Admission.refusal

    def twice(self: Admission, size: int) -> str | None:
        asked.append(size)
        # The first backward pass and the first update.
        return "retry in a second" if len(asked) in (3, 5) else original(self, size)

    config = TinkexConfig(base_url="http://x", api_key="tml-x", retry=QUICK)
    async with AsyncServiceClient.local(config=config) as service:
        expected = await losses()
        with monkeypatch.context() as patch:
            patch.setattr(Admission, "refusal", twice)
            assert await losses() == expected
    assert len(asked) == 12  # ten requests, two of them twice


@pytest.mark.parametrize("name", ["max_waiting_requests", "max_waiting_bytes", "max_body_bytes", "max_models"])
async def test_invalid_limits_are_refused(name):
    for value in (-1, 1.5, True, None):
        with pytest.raises(ConfigError, match=name):
            LocalOptions(**{name: value})
