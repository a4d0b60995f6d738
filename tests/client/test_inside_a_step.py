"""What a term may ask of its own training client."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from tests.client.data import bad_datum, datum, nll
from tests.client.recorder import after, sent_weights
from tinkex_py import (
    PrecedingRequestFailed,
    RegularizerError,
    RegularizerSpec,
    RequestFailed,
    RequestInsideStep,
)

pytestmark = pytest.mark.asyncio
DATA = [datum(4, 1), datum(2, 2)]


async def test_a_reference_that_awaits_a_forward_inside_the_step(bench):
    training = await bench.train()

    async def kl(data: Any, logprobs: torch.Tensor) -> Any:
        answer = await training.forward(data)
        reference = torch.from_numpy(answer.packed["logprobs"].values.copy()) - 0.5
        return (logprobs.exp() * (logprobs - reference)).sum(), {"reference": reference.sum()}

    async with asyncio.timeout(20):
        output, _ = await asyncio.gather(
            training.forward_backward_custom(
                DATA, nll, regularizers=[RegularizerSpec(fn=kl, weight=2.0, name="kl")], track_grad_norms=True
            ),
            training.optim_step(),
        )
    assert bench.kinds(training) == ["F", "F", "B", "optim_step"]
    # d/dp of -p + 2 exp(p)(p - q) is -1 + 2 exp(p)(p - q + 1), and p - q = 0.5: the reference is the same model.
    weights = sent_weights([bench.recorder.of("B")[0].message])
    logprobs = output.service_output.packed["logprobs"].values
    np.testing.assert_allclose((1 - weights) / 3, np.exp(logprobs), rtol=1e-3, atol=1e-6)


async def test_two_terms_may_ask_at_the_same_time(bench):
    training = await bench.train()

    async def asks(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.gather(training.forward(data), training.forward(data[:1]))
        return logprobs.sum()

    specs = [RegularizerSpec(fn=asks, weight=0.5, name=name) for name in "ab"]
    async with asyncio.timeout(20):
        await training.forward_backward_custom(DATA, nll, regularizers=specs)
    assert bench.kinds(training) == ["F"] * 5 + ["B"]


async def asks_for(training: Any, name: str) -> Any:
    match name:
        case "optim_step":
            return await training.optim_step()
        case "forward_backward":
            return await training.forward_backward(DATA)
        case "forward_backward_custom":
            return await training.forward_backward_custom(DATA, nll)
        case "save_state":
            return await training.save_state("inside")
        case _:
            return await training.save_weights_and_get_sampling_client()


REQUESTS = ["optim_step", "forward_backward", "forward_backward_custom", "save_state", "sampling client"]


@pytest.mark.parametrize(("name", "sync"), [*((name, False) for name in REQUESTS), ("optim_step", True)])
async def test_anything_else_is_refused_at_once(bench, name, sync):
    training = await bench.train()
    loop = asyncio.get_running_loop()

    async def on_the_loop(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asks_for(training, name)
        return logprobs.sum()

    def in_a_thread(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        asyncio.run_coroutine_threadsafe(asks_for(training, name), loop).result(10)
        return logprobs.sum()

    spec = RegularizerSpec(fn=in_a_thread if sync else on_the_loop, weight=1.0, name="nosy")
    async with asyncio.timeout(20):
        with pytest.raises((RegularizerError, RequestInsideStep)) as caught:
            await training.forward_backward_custom(DATA, nll, regularizers=[spec])
    error = caught.value
    assert isinstance(error if isinstance(error, RequestInsideStep) else error.__cause__, RequestInsideStep)
    assert bench.kinds(training) == ["F"]
    await asks_for(training, name)  # after the step it is fine


async def test_a_sync_term_may_ask_for_a_forward_too(bench):
    training = await bench.train()
    loop = asyncio.get_running_loop()

    def reference(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        answer = asyncio.run_coroutine_threadsafe(training.forward(data), loop).result(10)
        return (logprobs - torch.from_numpy(answer.packed["logprobs"].values.copy())).square().sum() + logprobs.sum()

    async with asyncio.timeout(20):
        await training.forward_backward_custom(DATA, reference)
    assert bench.kinds(training) == ["F", "F", "B"]


async def test_a_term_may_train_another_client_and_sample(bench):
    training, other = await bench.train(), await bench.train()

    async def trains_the_other(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await other.forward_backward(data)
        await other.optim_step()
        return -logprobs.sum()

    await training.forward_backward_custom(DATA, trains_the_other)
    assert bench.kinds(training) == ["F", "B"]
    assert bench.kinds(other) == ["B", "optim_step"]


async def test_a_task_that_outlives_the_step_is_an_ordinary_caller(bench):
    training = await bench.train()
    later: list[asyncio.Task[Any]] = []
    over = asyncio.Event()

    async def after_the_step() -> Any:
        await over.wait()
        return await training.optim_step()

    async def leaves_a_task(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        later.append(asyncio.create_task(after_the_step()))
        return -logprobs.sum()

    await training.forward_backward_custom(DATA, leaves_a_task)
    over.set()
    await later[0]
    assert bench.kinds(training) == ["F", "B", "optim_step"]


async def test_an_abandoned_terms_forward_after_the_step_sends_nothing_inside_another_step(bench):
    """A forward that a term started and that is still queued when its step ends must not run in a foreign turn."""
    training = await bench.train()
    started = asyncio.Event()
    asked: list[asyncio.Task[Any]] = []

    async def starts_and_fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        asked.append(asyncio.create_task(training.forward(data)))
        started.set()
        raise ValueError("enough")

    with pytest.raises(RegularizerError):
        await training.forward_backward_custom(DATA, starts_and_fails)
    result = (await asyncio.gather(*asked, return_exceptions=True))[0]
    assert not isinstance(result, asyncio.CancelledError)
    await training.forward_backward_custom(DATA, nll)
    assert bench.kinds(training)[-2:] == ["F", "B"]


async def test_a_step_cancelled_while_its_term_asks_leaves_the_client_in_order(bench):
    training = await bench.train()
    gate = asyncio.Event()
    bench.recorder.faults["F"] = [None, after(gate)]

    async def asks(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await training.forward(data)
        return logprobs.sum()

    step = asyncio.create_task(training.forward_backward_custom(DATA, asks))
    update = asyncio.create_task(training.optim_step())
    await bench.recorder.until(lambda: len(bench.recorder.of("F")) == 2)
    step.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait([step])
    next_step = asyncio.create_task(training.forward_backward_custom(DATA, nll))
    with pytest.raises(PrecedingRequestFailed):
        await update
    assert not next_step.done()  # the wire is still taken by the forward that was asked for
    gate.set()
    await next_step
    assert bench.kinds(training) == ["F", "F", "F", "B"]


async def test_a_forward_that_fails_fails_the_term_and_breaks_nothing_else(bench):
    training = await bench.train()

    async def asks(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await training.forward([bad_datum()])
        return logprobs.sum()

    spec = RegularizerSpec(fn=asks, weight=1.0, name="reference", on_error="skip")
    output = await training.forward_backward_custom(DATA, nll, regularizers=[spec])
    assert list(output.skipped) == ["reference"]
    with pytest.raises(RegularizerError) as caught:
        await training.forward_backward_custom(DATA, asks)
    assert isinstance(caught.value.__cause__, RequestFailed)
    assert bench.kinds(training) == ["F", "F", "B", "F", "F"]
