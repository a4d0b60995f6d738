"""A client raises a typed error on a second event loop, even during a step, and stays usable on its own loop."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from tests.client.data import nll
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.runs import ADAM, DATA, NO_HANG, assert_same, config, new_client, short_run, weights
from tinkex_py import AsyncServiceClient, ClientClosed, ModelInput


def on_another_loop(call: Callable[[], Awaitable[Any]]) -> BaseException | None:
    """Runs a call on another loop in another thread; returns its error."""
    outcomes: list[BaseException | None] = []

    async def use() -> None:
        (outcome,) = await asyncio.gather(call(), return_exceptions=True)
        outcomes.append(outcome if isinstance(outcome, BaseException) else None)

    thread = threading.Thread(target=lambda: asyncio.run(use()))
    thread.start()
    thread.join(NO_HANG)
    return outcomes[0]


@pytest.mark.asyncio
async def test_a_second_loop_in_the_middle_of_a_step(proxy: FaultProxy, served, expected: dict[str, np.ndarray], tally):
    """Both while the gradient of a step is in flight and when the client is idle."""
    patient = config(proxy.url, timeout=NO_HANG, poll_timeout=NO_HANG)
    release = asyncio.Event()

    async def hold(passing: Any) -> None:
        answer = await passing.ask()
        await passing.unless_client_leaves(release.wait())
        await passing.answer(answer)

    async with asyncio.timeout(2 * NO_HANG), AsyncServiceClient(patient) as service:
        training = await new_client(service)
        sampler = await service.create_sampling_client(base_model="tiny")
        calls: list[Callable[[], Awaitable[Any]]] = [
            service.get_server_capabilities,
            lambda: new_client(service),
            lambda: service.create_rest_client().training_runs_page(),
            lambda: training.forward(DATA),
            lambda: training.forward_backward(DATA),
            lambda: training.forward_backward_custom(DATA, nll),
            lambda: training.optim_step(ADAM),
            lambda: training.save_state("elsewhere"),
            training.get_info,
            training.aclose,
            service.aclose,
            lambda: sampler.sample(ModelInput.from_ints([1])),
        ]
        proxy.spoil("B", Fault("held", hold, answers=True))
        run = asyncio.create_task(short_run(training))
        await proxy.until(lambda: proxy.requests["B"] >= 1)
        for _ in range(2):
            for index, call in enumerate(calls):
                failure = await asyncio.to_thread(on_another_loop, call)
                assert isinstance(failure, ClientClosed), (index, failure)
                assert "loop" in str(failure), (index, failure)
            release.set()
            path = await run
        await sampler.sample(ModelInput.from_ints([1]))
        await training.forward(DATA)
    proxy.check_numbers(training.model_id)
    assert_same(weights(served.state, path), expected)
    tally.injected["used on a second loop", "any"] += 2 * len(calls)
    tally.checked["a second loop is refused, the first continues"] += 2 * len(calls)
