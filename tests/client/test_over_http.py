"""Over a real socket: training truth, and a storm of cancelled requests."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from tests.client.data import datum
from tinkex_py import AdamParams, Datum, ModelInput
from tinkex_py.losses import packed_field

pytestmark = pytest.mark.asyncio
TEXTS = ["the sea is blue and wide", "tea is hot", "a bird sings at dawn", "snow falls"]
ADAM = AdamParams(learning_rate=5e-3)


def text_datum(text: str) -> Datum:
    ids = [256, *text.encode(), 257]
    weights = np.ones(len(ids) - 1, np.float32)
    return Datum(
        model_input=ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": ids[1:], "weights": weights}
    )


def masked_nll(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return -(packed_field(data, "weights") * logprobs).sum()


async def test_twenty_steps_lower_the_loss_and_both_ways_agree(http_bench):
    data = [text_datum(text) for text in TEXTS]
    builtin, custom = await http_bench.train(rank=8, seed=7), await http_bench.train(rank=8, seed=7)
    losses: dict[str, list[float]] = {"builtin": [], "custom": []}
    for _ in range(20):
        first, second, *_ = await asyncio.gather(
            builtin.forward_backward(data),
            custom.forward_backward_custom(data, masked_nll),
            builtin.optim_step(ADAM),
            custom.optim_step(ADAM),
        )
        losses["builtin"].append(first.metrics["loss:sum"])
        losses["custom"].append(second.loss_total)
    for series in losses.values():
        assert series[-1] <= 0.8 * series[0]
    np.testing.assert_allclose(losses["custom"], losses["builtin"], rtol=1e-4)
    assert http_bench.kinds(builtin) == ["B", "optim_step"] * 20
    assert http_bench.kinds(custom) == ["F", "B", "optim_step"] * 20


async def test_fifty_rounds_of_twenty_cancelled_requests_leave_the_client_working(http_bench):
    service, recorder = http_bench.service, http_bench.recorder
    training = await http_bench.train()
    data = [datum(3, 1)]
    started = 0
    for turn in range(50):
        seen = len(recorder.arrivals)
        tasks = [asyncio.create_task(service.get_server_capabilities()) for _ in range(16)]
        tasks += [asyncio.create_task(training.forward(data)) for _ in range(2)]
        tasks += [asyncio.create_task(training.get_tokenizer()), asyncio.create_task(training.forward_backward(data))]
        await recorder.until(lambda seen=seen, turn=turn: len(recorder.arrivals) > seen + turn % 12)
        started += len(recorder.arrivals) - seen
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert started > 50
    async with asyncio.timeout(20):
        capabilities = await service.get_server_capabilities()
        assert capabilities.supported_models[0].model_name == "tiny"
        await training.forward_backward_custom(data, masked_nll)
        await training.optim_step()
        sampler = await training.save_weights_and_get_sampling_client()
        assert len((await sampler.sample(ModelInput.from_ints([1, 2]), num_samples=2)).sequences) == 2
    assert http_bench.kinds(training)[-4:] == ["F", "B", "optim_step", "save_weights_for_sampler"]


async def test_a_checkpoint_carries_the_training_on(http_bench):
    data = [text_datum(text) for text in TEXTS]
    training = await http_bench.train()
    await training.forward_backward(data)
    await training.optim_step(ADAM)
    saved = await training.save_state("s1")
    again = await http_bench.service.create_training_client_from_state(saved.path, with_optimizer=True)
    results = []
    for client in (training, again):
        await client.forward_backward(data)
        await client.optim_step(ADAM)
        results.append((await client.forward(data)).packed["logprobs"].values)
    np.testing.assert_array_equal(results[0], results[1])


async def test_other_services_of_the_same_server_live_on(http_bench):
    """Two sessions at a time, on the same loop."""
    from tests.client.recorder import quick_config
    from tinkex_py import AsyncServiceClient

    training = await http_bench.train()
    async with AsyncServiceClient(quick_config(http_bench.service.config.base_url)) as second:
        other = await second.create_lora_training_client("tiny", rank=4)
        await asyncio.gather(training.forward_backward([datum(3, 1)]), other.forward_backward([datum(3, 1)]))
    await training.optim_step()
    assert http_bench.kinds(training) == ["B", "optim_step"]
