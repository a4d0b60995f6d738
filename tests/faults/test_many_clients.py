"""200 training clients on one loop: each trains as it would alone, over few connections."""

import asyncio
from collections.abc import Sequence

import pytest

from tests.client.data import datum, nll
from tests.faults.proxy import FaultProxy
from tests.faults.runs import ADAM, NO_HANG, config, smooth
from tinkex_py import AsyncServiceClient, AsyncTrainingClient, Datum, RegularizerSpec

pytestmark = pytest.mark.asyncio
CLIENTS = 200
RECIPES = 8
CONNECTIONS, POLLS = 4, 12
SETTINGS = {"timeout": NO_HANG, "poll_timeout": NO_HANG, "max_connections": CONNECTIONS, "max_polls": POLLS}


def recipe(number: int) -> tuple[int, Sequence[Datum]]:
    """Returns the seed and the data of a recipe."""
    return 100 + number, [datum(2 + number % 3, 50 + number), datum(3, 90 + number)]


async def step(training: AsyncTrainingClient, data: Sequence[Datum]) -> list[float]:
    """Runs a custom step with its optimizer step; returns their numbers and all logprobs of the new weights."""
    specs = [RegularizerSpec(fn=smooth, weight=0.5, name="smooth")]
    loss, update, after = await asyncio.gather(
        training.forward_backward_custom(data, nll, regularizers=specs, track_grad_norms=True),
        training.optim_step(ADAM),
        training.forward(data),
    )
    assert loss.total_grad_norm is not None
    numbers = [loss.loss_total, loss.total_grad_norm, update.metrics["grad_norm"]]
    return [*numbers, *after.packed["logprobs"].values.tolist()]


async def small_client(service: AsyncServiceClient, seed: int) -> AsyncTrainingClient:
    """Returns a client with few adapted layers."""
    return await service.create_lora_training_client("tiny", rank=1, seed=seed, train_mlp=False, train_unembed=False)


async def alone(url: str, number: int) -> list[float]:
    async with AsyncServiceClient(config(url, **SETTINGS)) as service:
        seed, data = recipe(number)
        return await step(await small_client(service, seed), data)


async def test_two_hundred_training_clients_on_one_loop(proxy: FaultProxy, tally):
    """Two service clients with a hundred training clients each."""
    proxy.heal()
    expected = [await alone(proxy.url, number) for number in range(RECIPES)]
    assert len({tuple(numbers) for numbers in expected}) == RECIPES, "recipes with equal numbers"
    await proxy.until(lambda: proxy.open_connections == 0)
    proxy.most_connections = 0
    async with (
        asyncio.timeout(3 * NO_HANG),
        AsyncServiceClient(config(proxy.url, **SETTINGS)) as one,
        AsyncServiceClient(config(proxy.url, **SETTINGS)) as other,
    ):

        async def together(number: int) -> tuple[AsyncTrainingClient, list[float]]:
            seed, data = recipe(number % RECIPES)
            training = await small_client(one if number % 2 else other, seed)
            return training, await step(training, data)

        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(together(number)) for number in range(CLIENTS)]
        clients = [run.result()[0] for run in runs]
        assert all(training._ordering.is_empty for training in clients)
        assert one._session.pass_bytes.held == other._session.pass_bytes.held == 0
    assert 2 < proxy.most_connections <= 2 * (CONNECTIONS + POLLS)  # both clients send several requests at once
    await proxy.until(lambda: proxy.open_connections == 0)
    for number, run in enumerate(runs):
        training, numbers = run.result()
        assert numbers == expected[number % RECIPES]
        proxy.check_numbers(training.model_id)
    tally.checked["many clients train as they would alone"] += CLIENTS
