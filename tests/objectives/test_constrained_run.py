"""A constrained training of the embedded model against the best of five fixed weights."""

import asyncio
from statistics import fmean
from typing import Any

import pytest

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, Pipeline, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.regularizers import SampledKL

BOUND = 0.2  # nats per token
FIXED = (0.01, 0.1, 1.0, 10.0, 100.0)
SEEDS = (0, 1, 2)
STEPS = 40
TOKENS = list(b"Ahoy!")


async def last_quarter(service: AsyncServiceClient, seed: int, **weight: Any) -> tuple[float, float]:
    """Base loss and KL of a training with this weight or bound, both as means over its last quarter."""
    training = await service.create_lora_training_client("tiny", rank=4, seed=seed)
    model_input, targets = ModelInput.from_ints(TOKENS[:-1]), TOKENS[1:]
    plain = Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets})
    (before,) = (await training.forward([plain])).loss_fn_outputs
    fields = {"target_tokens": targets, "reference_logprobs": before["logprobs"]}
    data = [Datum(model_input=model_input, loss_fn_inputs=fields)]
    kl = SampledKL(reference_field="reference_logprobs", estimator="k2", mask=None, reduction="token-mean")
    pipeline = Pipeline(NLL(mask=None, reduction="token-mean"), [RegularizerSpec(fn=kl, name="kl", **weight)])
    outputs = []
    for _ in range(STEPS):
        output, _ = await asyncio.gather(
            training.forward_backward_custom(data, pipeline), training.optim_step(AdamParams(learning_rate=5e-3))
        )
        outputs.append(output)
    tail = outputs[-STEPS // 4 :]
    return fmean(one.base_loss.value for one in tail), fmean(one.regularizers["kl"].value for one in tail)


@pytest.mark.asyncio
async def test_a_constrained_run_is_feasible_and_no_worse_than_the_best_fixed_weight() -> None:
    async with AsyncServiceClient.local(model="tiny") as service:
        bounded = [await last_quarter(service, seed, at_most=BOUND) for seed in SEEDS]
        fixed = {weight: [await last_quarter(service, seed, weight=weight) for seed in SEEDS] for weight in FIXED}
    for at in range(len(SEEDS)):
        base, value = bounded[at]
        feasible = [runs[at][0] for runs in fixed.values() if runs[at][1] <= 1.1 * BOUND]
        assert value <= 1.1 * BOUND
        assert base <= min(feasible)
