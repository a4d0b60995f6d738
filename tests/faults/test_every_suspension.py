"""Calls cancelled at each of their suspensions, over HTTP: the client stays usable, and the weights are correct."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.client.data import nll
from tests.client.test_cancellation import Cancelling
from tests.faults.proxy import FaultProxy
from tests.faults.runs import ADAM, DATA, NO_HANG, assert_same, config, new_client, weights
from tinkex_py import AsyncServiceClient, AsyncTrainingClient, ClientClosed, TinkexConfig

pytestmark = pytest.mark.asyncio
PATIENT = {"timeout": NO_HANG, "poll_timeout": NO_HANG}


async def cancelled_at(make: Callable[[], Any], at: int) -> tuple[asyncio.Task[Any], bool]:
    """Cancels a call at its suspension `at`; also returns whether it had that many."""
    driven = Cancelling(make(), at, late=False)

    async def drive() -> Any:
        return await driven

    task = asyncio.create_task(drive())
    await asyncio.wait([task])
    return task, driven.suspensions >= at


async def twin_of(service: AsyncServiceClient, updates: list[bool]) -> AsyncTrainingClient:
    """Returns a client after these passes, each followed by an optimizer step if True."""
    twin = await new_client(service)
    for updated in updates:
        await twin.forward_backward_custom(DATA, nll)
        if updated:
            await twin.optim_step(ADAM)
    return twin


async def saved(training: AsyncTrainingClient) -> str:
    return (await training.save_state("after")).path


@pytest.mark.parametrize("call", ["custom step", "optim_step", "save_state"])
async def test_cancelled_at_every_suspension(proxy: FaultProxy, served, tally, call: str):
    """A twin repeats exactly the requests that were handed over."""
    proxy.heal()
    passes: list[bool] = []  # every pass that took effect, and whether an update followed
    async with asyncio.timeout(2 * NO_HANG), AsyncServiceClient(config(proxy.url, **PATIENT)) as service:
        training = await new_client(service)
        at, reached = 1, True
        while reached:
            if call == "custom step":
                before = training.accumulated
                task, reached = await cancelled_at(lambda: training.forward_backward_custom(DATA, nll), at)
                happened = training.accumulated == before + 1
                assert happened or task.cancelled(), task
                if happened:
                    await training.optim_step(ADAM)
                    passes.append(True)
            else:
                await training.forward_backward_custom(DATA, nll)
                if call == "optim_step":
                    task, reached = await cancelled_at(lambda: training.optim_step(ADAM), at)
                    passes.append(training.accumulated == 0)
                else:
                    name = f"cancelled{at}"
                    task, reached = await cancelled_at(lambda name=name: training.save_state(name), at)
                    await training.optim_step(ADAM)
                    passes.append(True)
            assert not task.cancelled() or reached
            await training._ordering.drain(NO_HANG)
            assert training._ordering.is_empty
            at += 1
        assert at > 5
        path, expected = await saved(training), await saved(await twin_of(service, passes))
    proxy.check_numbers(training.model_id)
    assert_same(weights(served.state, path), weights(served.state, expected))
    tally.injected["cancelled at a suspension", call] += at - 2
    tally.checked["a cancelled call leaves the client usable"] += at - 2


@pytest.mark.parametrize("call", ["entering", "first model"])
async def test_opening_cancelled_at_every_suspension(proxy: FaultProxy, tally, call: str):
    """A failed entry closes the client; a cancelled first call leaves it usable."""
    proxy.heal()
    settings: TinkexConfig = config(proxy.url, **PATIENT)
    at, reached = 1, True
    async with asyncio.timeout(2 * NO_HANG):
        while reached:
            service = AsyncServiceClient(settings)
            make: Callable[[], Awaitable[Any]] = service.__aenter__
            if call == "first model":
                make = lambda service=service: new_client(service)  # noqa: E731
            task, reached = await cancelled_at(make, at)
            assert task.cancelled() == reached, task
            if call == "first model":
                training = await new_client(service)
                await asyncio.gather(training.forward_backward_custom(DATA, nll), training.optim_step(ADAM))
            elif reached:
                with pytest.raises(ClientClosed):
                    await service.get_server_capabilities()
            await service.aclose()
            at += 1
        assert at > 3
        await proxy.until(lambda: proxy.open_connections == 0)
    tally.injected["cancelled at a suspension", call] += at - 2
    tally.checked["a cancelled call leaves the client usable"] += at - 2
