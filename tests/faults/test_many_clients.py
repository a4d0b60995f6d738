"""200 training clients on one loop: each trains as if it were alone, over few connections."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from tests.client.data import datum, nll
from tests.faults.proxy import FaultProxy
from tests.faults.runs import ADAM, NO_HANG, assert_same, config, new_client, smooth, weights
from tinkex_py import AsyncServiceClient, AsyncTrainingClient, Datum, RegularizerSpec

pytestmark = pytest.mark.asyncio
CLIENTS = 200
RECIPES = 20
CONNECTIONS, POLLS = 4, 12
SETTINGS = {"timeout": NO_HANG, "poll_timeout": NO_HANG, "max_connections": CONNECTIONS, "max_polls": POLLS}


def recipe(number: int) -> tuple[int, Sequence[Datum]]:
    """A seed, and data of its own."""
    return 100 + number, [datum(2 + number % 3, 50 + number), datum(3, 90 + number)]


async def step(training: AsyncTrainingClient, data: Sequence[Datum]) -> tuple[list[float], str]:
    """What a custom step and its optimizer step say, sent in one burst, and the checkpoint after them."""
    specs = [RegularizerSpec(fn=smooth, weight=0.5, name="smooth")]
    loss, update, saved = await asyncio.gather(
        training.forward_backward_custom(data, nll, regularizers=specs, track_grad_norms=True),
        training.optim_step(ADAM),
        training.save_state("after"),
    )
    assert loss.total_grad_norm is not None
    return [loss.loss_total, loss.total_grad_norm, update.metrics["grad_norm"]], saved.path


async def alone(url: str, number: int) -> tuple[list[float], str]:
    async with AsyncServiceClient(config(url, **SETTINGS)) as service:
        seed, data = recipe(number)
        return await step(await new_client(service, seed), data)


async def test_two_hundred_training_clients_on_one_loop(proxy: FaultProxy, served, tally):
    """Two service clients with a hundred training clients each."""
    proxy.heal()
    expected = [await alone(proxy.url, number) for number in range(RECIPES)]
    assert len({told[0] for told, _ in expected}) == RECIPES, "recipes that cannot be told apart"
    await proxy.until(lambda: proxy.open_connections == 0)
    proxy.most_connections = 0
    async with (
        asyncio.timeout(3 * NO_HANG),
        AsyncServiceClient(config(proxy.url, **SETTINGS)) as one,
        AsyncServiceClient(config(proxy.url, **SETTINGS)) as other,
    ):

        async def together(number: int) -> tuple[AsyncTrainingClient, list[float], str]:
            seed, data = recipe(number % RECIPES)
            training = await new_client(one if number % 2 else other, seed)
            return training, *await step(training, data)

        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(together(number)) for number in range(CLIENTS)]
        clients = [run.result()[0] for run in runs]
        assert all(training._requests.lane.is_empty for training in clients)
        assert one._connection.pass_bytes.held == other._connection.pass_bytes.held == 0
    assert 2 * POLLS <= proxy.most_connections <= 2 * (CONNECTIONS + POLLS)
    await proxy.until(lambda: proxy.open_connections == 0)
    kept = [weights(served.state, path) for _, path in expected]
    for number, run in enumerate(runs):
        training, told, path = run.result()
        np.testing.assert_array_equal(told, expected[number % RECIPES][0])
        assert_same(weights(served.state, path), kept[number % RECIPES])
        proxy.check_numbers(training.model_id)
    tally.checked["many clients train as if alone"] += CLIENTS
