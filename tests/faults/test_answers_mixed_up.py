"""Answers that come twice, and answers of several requests in another order: each request gets its own or none."""

import asyncio
import itertools

import numpy as np
import pytest

from tests.client.data import datum
from tests.faults.catalogue import RECOVERS
from tests.faults.proxy import Fault, FaultProxy, Passing
from tests.faults.runs import ADAM, NO_HANG, PLACES, assert_same, config, new_client, short_run, weights
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


class Swapped:
    """Of two requests at a time, the first is answered after the second."""

    def __init__(self) -> None:
        self.fault = Fault("answered in swapped order", self._act, answers=True)
        self.swaps = 0
        self._first: asyncio.Event | None = None

    async def _act(self, passing: Passing) -> None:
        answer = await passing.ask()
        if self._first is None:
            self._first = asyncio.Event()
            await passing.unless_client_leaves(self._first.wait())
            await passing.answer(answer)
            return
        first, self._first = self._first, None
        await passing.answer(answer)
        self.swaps += 1
        first.set()


@pytest.mark.parametrize("place", PLACES)
async def test_two_requests_answered_in_swapped_order(proxy: FaultProxy, served, expected, tally, place: str):
    """Two clients of one service client step at the same time, over the same pool."""
    swapped = Swapped()
    patient = {"timeout": NO_HANG, "poll_timeout": NO_HANG}
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, **patient)) as service:
        clients = [await new_client(service), await new_client(service)]
        proxy.spoil(place, swapped.fault, swapped.fault)
        paths = await asyncio.gather(*(short_run(training) for training in clients))
    assert swapped.swaps == 1
    for training, path in zip(clients, paths, strict=True):
        proxy.check_numbers(training.model_id)
        assert_same(weights(served.state, path), expected)
    tally.checked["each request gets its own answer"] += 2


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
