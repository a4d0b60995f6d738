"""100 large batches at once: the limit of the service bounds the bytes in flight, whatever the number of batches."""

import asyncio
import tracemalloc

import pytest

from tests.client.data import datum, nll
from tests.faults.runs import NO_HANG, config
from tests.support.scripted_server import ScriptedServer, answer, stop_reading
from tinkex_py import AsyncServiceClient

pytestmark = pytest.mark.asyncio
BATCHES = 100
TOKENS = 40_000
BATCH = 16 * TOKENS
"""Approximate bytes on the wire: tokens, targets and weights."""
LIMIT = 5 * BATCH
PASSES = "/api/v1/forward_backward"


def script(server: ScriptedServer) -> None:
    """Scripts a service that creates models, and then does not read the body of any pass."""
    server.script("/api/v1/client/config", answer(json={"fwdbwd_dispatch_bytes_semaphore_size": LIMIT}))
    server.script("/api/v1/create_session", answer(json={"session_id": "s1"}))
    server.script("/api/v1/get_server_capabilities", answer(json={"supported_models": [{"model_name": "tiny"}]}))
    server.script("/api/v1/create_model", answer(json={"request_id": "made"}))
    server.script("/api/v1/retrieve_future", answer(json={"model_id": "m1"}))
    server.script("/api/v1/sessions/s1/finish", answer(json={}))
    server.script(PASSES, stop_reading())


@pytest.mark.parametrize("kind", ["calls of many clients", "calls of one client", "custom steps of one client"])
async def test_a_hundred_large_batches(tally, kind: str):
    data = [datum(TOKENS, 1)]
    async with asyncio.timeout(2 * NO_HANG), ScriptedServer() as server:
        script(server)
        patient = {"timeout": NO_HANG, "wire": "protobuf", "close_timeout": 0.0}
        service = AsyncServiceClient(config(server.url, **patient))
        created = [
            await service.create_lora_training_client("tiny")
            for _ in range(BATCHES if kind == "calls of many clients" else 1)
        ]
        clients = (created * BATCHES)[:BATCHES]
        fitting = LIMIT // BATCH if len(created) > 1 else 1  # one client sends one at a time
        tracemalloc.start()
        try:
            if kind.startswith("custom"):
                steps = [asyncio.create_task(training.forward_backward_custom(data, nll)) for training in clients]
            else:
                steps = [asyncio.create_task(training.forward_backward(data)) for training in clients]
            await server.until(lambda: sum(target == PASSES for target in server.started) >= fitting)
            for _ in range(100):  # every call that can proceed has proceeded
                await asyncio.sleep(0)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert not any(step.done() for step in steps)
        assert sum(target == PASSES for target in server.started) == fitting
        assert 0 < service._session.pass_bytes.held <= LIMIT
        assert peak <= 3 * LIMIT, f"{peak / BATCH:.1f} batches in memory"
        for step in steps:
            step.cancel()
        await asyncio.wait(steps)
        server.reading_again.set()
        await service.aclose()
        assert service._session.pass_bytes.held == 0
        await server.until(lambda: server.open_connections == 0)
    tally.injected["a service that does not read", "B"] += fitting
    tally.checked["waiting batches are not encoded"] += BATCHES
