"""Every training write is applied exactly once, whatever happens on the way: the weights are those of a quiet run."""

import asyncio

import pytest

from tests.faults.catalogue import HINTS, RECOVERS
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.runs import NO_HANG, PLACES, assert_same, config, new_client, short_run, weights
from tinkex_py import AsyncServiceClient
from tinkex_py.transport import answer

pytestmark = pytest.mark.asyncio


async def spoiled_run(proxy: FaultProxy, place: str, faults: list[Fault]) -> tuple[str, str]:
    """A short run with these faults at the first request of a place; the model's id and its last checkpoint."""
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url)) as service:
        training = await new_client(service)
        proxy.spoil(place, *faults)
        path = await short_run(training)
    for fault in faults:
        assert proxy.injected[fault.name, place] == faults.count(fault)
    proxy.check_numbers(training.model_id)
    return training.model_id, path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("faults", RECOVERS.values(), ids=RECOVERS)
async def test_a_fault_at_any_place_of_a_step(proxy: FaultProxy, served, expected, tally, faults, place: str):
    _, path = await spoiled_run(proxy, place, faults)
    assert_same(weights(served.state, path), expected)
    tally.checked["every write applied exactly once"] += 1


@pytest.mark.parametrize("place", PLACES)
async def test_every_form_of_retry_after(proxy: FaultProxy, served, expected, tally, monkeypatch, place: str):
    """The longest wait that is obeyed is made short, so that huge ones and far dates can be obeyed too."""
    monkeypatch.setattr(answer, "LONGEST_RETRY_AFTER", 0.02)
    _, path = await spoiled_run(proxy, place, HINTS)
    assert_same(weights(served.state, path), expected)
    tally.checked["every write applied exactly once"] += 1
