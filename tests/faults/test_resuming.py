"""A step that cannot complete ends in typed errors; a run resumed from its checkpoint gets the same weights."""

import asyncio
import itertools
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.client.data import nll
from tests.faults.catalogue import FINAL
from tests.faults.proxy import Fault, FaultProxy, Passing
from tests.faults.runs import (
    ADAM,
    DATA,
    NO_HANG,
    PLACES,
    assert_same,
    config,
    new_client,
    resumed_run,
    saved_run,
    weights,
)
from tests.support.served import serving
from tinkex_py import (
    AsyncServiceClient,
    AsyncTrainingClient,
    NotFound,
    PrecedingRequestFailed,
    RetryPolicy,
    TinkexError,
)
from tinkex_py.errors import ResultLost

pytestmark = pytest.mark.asyncio


async def errors_of_a_step(training: AsyncTrainingClient) -> list[TinkexError]:
    """Starts both requests of a step together; returns their errors, which are typed."""
    calls = (training.forward_backward_custom(DATA, nll), training.optim_step(ADAM))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert errors, "the step succeeded"
    assert all(isinstance(error, TinkexError) for error in errors), errors
    assert not isinstance(errors[0], PrecedingRequestFailed), "no request precedes it"
    return [error for error in errors if isinstance(error, TinkexError)]


@pytest.mark.parametrize("place", PLACES)
async def test_final_responses_end_in_typed_errors(proxy, served, twin, tally, place: str):
    proxy.heal()  # calls in one chunk each
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url)) as service:
        checkpoint = await saved_run(service)
        for fault in FINAL:
            training = await service.create_training_client_from_state(checkpoint, with_optimizer=True)
            proxy.spoil(place, fault)
            await errors_of_a_step(training)
            assert proxy.injected[fault.name, place] == 1, "a final response is not retried"
            tally.checked["final responses end in typed errors"] += 1
        path = await resumed_run(service, checkpoint)
    assert_same(weights(served.state, path), twin)
    tally.checked["a resumed run equals its twin"] += 1


async def test_an_expired_future_is_a_typed_error(proxy: FaultProxy):
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url)) as service:
        training = await new_client(service)
        expired = next(fault for fault in FINAL if fault.name == "status 410, before")
        proxy.spoil("retrieve_future", expired)
        with pytest.raises(ResultLost, match="create_training_client_from_state"):
            await training.forward_backward(DATA)


def in_flight(killed: asyncio.Event, *, accepted: bool) -> Fault:
    """Returns the fault of a request that is in flight when the service is killed."""

    async def act(passing: Passing) -> None:
        if accepted:
            await passing.ask()
        await passing.unless_client_leaves(killed.wait())
        await passing.reset()

    return Fault(f"restart of the service, request {'accepted' if accepted else 'not accepted'}", act)


@pytest.mark.timeout(8 * NO_HANG)
async def test_a_restart_in_the_middle_of_a_step(tmp_path: Path, twin, tally):
    """The service is killed while clients are at every place of a step, with the request accepted or not."""
    retry = RetryPolicy(deadline=60.0, initial_wait=0.01, max_wait=0.05)
    killed = asyncio.Event()
    with ExitStack() as stack:
        process, url = stack.enter_context(serving("--state-dir", str(tmp_path)))
        async with (
            asyncio.timeout(6 * NO_HANG),
            FaultProxy(url) as proxy,
            AsyncServiceClient(config(proxy.url, timeout=60.0, poll_timeout=60.0, retry=retry)) as service,
        ):
            checkpoint = await saved_run(service)
            steps: list[asyncio.Task[list[TinkexError]]] = []
            for place, accepted in itertools.product(PLACES, (False, True)):
                training = await service.create_training_client_from_state(checkpoint, with_optimizer=True)
                fault = in_flight(killed, accepted=accepted)
                proxy.spoil(place, fault)
                steps.append(asyncio.create_task(errors_of_a_step(training)))
                await proxy.until(lambda name=fault.name, place=place: proxy.injected[name, place] == 1)
            process.kill()
            process.wait(timeout=60)
            killed.set()
            restarted = serving("--state-dir", str(tmp_path))
            # In a thread: the clients run meanwhile.
            _, proxy.service_url = await asyncio.to_thread(stack.enter_context, restarted)
            for errors in await asyncio.gather(*steps):
                assert isinstance(errors[0], NotFound | ResultLost), errors
                tally.checked["a restart ends every call in a typed error"] += len(errors)
            path = await resumed_run(service, checkpoint)
        tally.injected.update(proxy.injected)
        assert_same(weights(tmp_path, path), twin)
        tally.checked["a resumed run equals its twin"] += 1
