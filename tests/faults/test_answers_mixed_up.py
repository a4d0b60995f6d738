"""Answers that come twice, and answers of several requests in another order: each request gets its own or none."""

import asyncio
import itertools

import numpy as np
import pytest

from tests.client.data import datum
from tests.faults.catalogue import RECOVERS
from tests.faults.proxy import FaultProxy
from tests.faults.runs import ADAM, NO_HANG, PLACES, assert_same, config, new_client, weights
from tinkex_py import AsyncServiceClient, AsyncTrainingClient

pytestmark = pytest.mark.asyncio
COPIED = RECOVERS["answered again to the next"][0]
# Of one shape, so that a mistaken result looks like the right one.
BATCHES = [[datum(4, seed)] for seed in range(1, 7)]


async def told(training: AsyncTrainingClient) -> tuple[list[np.ndarray], str]:
    """All that a run is answered, and the path of the checkpoint after it."""
    answers: list[np.ndarray] = []
    for batch, another in itertools.pairwise(BATCHES):
        forward = await training.forward(another)
        backward = await training.forward_backward(batch)
        update = await training.optim_step(ADAM)
        answers += [output.packed["logprobs"].values for output in (forward, backward)]
        answers.append(np.array([update.metrics["grad_norm"]]))
    return answers, (await training.save_state("after")).path


@pytest.mark.parametrize("place", [*PLACES, "any"])
async def test_a_copy_that_comes_when_the_next_request_is_there(proxy: FaultProxy, served, tally, place: str):
    """Nothing of it but its bytes says that it is the answer to another request."""
    proxy.heal()
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url)) as service:
        expected, expected_path = await told(await new_client(service))
        proxy.choose = lambda passing: COPIED if place in (passing.place, "any") else None
        training = await new_client(service)
        answers, path = await told(training)
    copies = sum(count for (name, _), count in proxy.injected.items() if name == "copy of the answer before")
    assert copies >= len(BATCHES) - 2, proxy.injected
    for one, other in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    proxy.check_numbers(training.model_id)
    assert_same(weights(served.state, path), weights(served.state, expected_path))
    tally.checked["each request gets its own answer"] += len(answers)
