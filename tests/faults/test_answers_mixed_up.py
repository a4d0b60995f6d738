"""Responses of several requests in another order: each request gets its own."""

import asyncio

import pytest

from tests.faults.proxy import Fault, FaultProxy, Passing
from tests.faults.runs import NO_HANG, PLACES, assert_same, config, new_client, short_run, weights
from tinkex_py import AsyncServiceClient

pytestmark = pytest.mark.asyncio


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
