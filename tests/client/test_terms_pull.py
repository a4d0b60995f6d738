"""Ready-made terms really move a model: with a strong pull to the reference it stays near it, without it does not."""

import asyncio
from typing import Any

import pytest
import torch

from tests.client.conftest import Bench
from tests.client.data import datum
from tinkex_py import AdamParams, Datum, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.regularizers import Consistency, SampledKL

pytestmark = pytest.mark.asyncio
STEPS = 20
LEARN = NLL(mask=None, reduction="token-mean")


async def distance_after(bench: Bench, regularizers: list[RegularizerSpec]) -> float:
    """Mean square of the change of the logprobs after training with these regularizers."""
    training = await bench.train(rank=8)
    data = [datum(length, seed=length) for length in (6, 9)]
    untouched = [output["logprobs"].to_torch() for output in (await training.forward(data)).loss_fn_outputs]
    data = [with_input(item, reference_logprobs=part) for item, part in zip(data, untouched, strict=True)]
    for _ in range(STEPS):
        await asyncio.gather(
            training.forward_backward_custom(data, LEARN, regularizers=regularizers),
            training.optim_step(AdamParams(learning_rate=3e-3)),
        )
    after = [output["logprobs"].to_torch() for output in (await training.forward(data)).loss_fn_outputs]
    return float((torch.cat(after) - torch.cat(untouched)).square().mean())


def with_input(item: Datum, **inputs: Any) -> Datum:
    return Datum(model_input=item.model_input, loss_fn_inputs={**item.loss_fn_inputs, **inputs})


async def test_a_strong_pull_keeps_the_model_near_its_reference(bench: Bench):
    free = await distance_after(bench, [])
    # At rest the pull 3 * d equals the loss's own 1 (per token), so d is near 1/3: far less than half of the free run.
    assert free > 1.0
    for term in (
        SampledKL(reference_field="reference_logprobs", estimator="k3+", mask="weights", reduction="token-mean"),
        Consistency(pair_field="reference_logprobs", metric="mse", mask="weights"),
    ):
        assert await distance_after(bench, [RegularizerSpec(fn=term, weight=3.0, name="pull")]) < 0.25 * free
