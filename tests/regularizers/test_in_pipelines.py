"""Every ready-made term in a pipeline: packed leaves, both dtypes, threads; and a step on the embedded service."""

import pytest
import torch

from tests.losses.devices import DEVICES
from tests.regularizers.support import datum, datums, random_logprobs
from tinkex_py import AsyncServiceClient, Executor, Pipeline, RegularizerSpec
from tinkex_py.base_losses import CISPO, DPO, NLL, PPO, ImportanceSampling
from tinkex_py.regularizers import (
    L1,
    L2,
    Consistency,
    ElasticNet,
    Entropy,
    GradientPenalty,
    JensenShannon,
    KLDivergence,
    Orthogonality,
    SampledEntropy,
    SampledKL,
)

FIELD = {"reference_field": "reference_logprobs"}
MASKED = {"mask": "weights", "reduction": "seq-mean-token-mean"}
TOKENS = {"over": "tokens", **MASKED}
WEIGHTS = [1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 0.0, 1.0]
ON_BOTH = [
    L1(**MASKED),
    L2(center="mean", clip=3.0, **MASKED),
    ElasticNet(target="probs", **MASKED),
    Consistency(pair_field="reference_logprobs", metric="cosine", **MASKED),
    GradientPenalty(fn=L2()),
    NLL(**MASKED),
]
ON_TOKENS = [
    *ON_BOTH,
    Entropy(temperature=0.5, normalize=True, **TOKENS),
    KLDivergence(**FIELD, **TOKENS),
    JensenShannon(**FIELD, **TOKENS),
    SampledKL(**FIELD, **MASKED),
    SampledEntropy(**MASKED),
    DPO(**FIELD),
    ImportanceSampling(**MASKED),
    PPO(**MASKED),
    CISPO(**MASKED),
]
ON_CANDIDATES = [
    *ON_BOTH,
    Entropy(temperature=0.5, normalize=True, **MASKED),
    KLDivergence(**FIELD, symmetric=True, **MASKED),
    JensenShannon(**FIELD, **MASKED),
    Orthogonality(mode="spectral", mask="weights"),
]


def data_for(candidates):
    shape = (8,) if candidates is None else (8, candidates)
    reference = random_logprobs(*shape, seed=1)
    fields = {"reference_logprobs": reference, "logprobs": reference, "advantages": torch.ones(shape)}
    return datums((3, 1, 2, 2), candidates, weights=WEIGHTS, **fields)


@pytest.mark.asyncio
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("terms", "candidates"), [(ON_TOKENS, None), (ON_CANDIDATES, 3)])
async def test_packed_leaves_give_what_the_plain_tensor_gives(device, dtype, terms, candidates):
    if device == "mps" and dtype is torch.float64:
        pytest.skip("there are no float64 numbers on this device")
    logprobs = random_logprobs(8) if candidates is None else random_logprobs(8, candidates)
    logprobs = logprobs.to(dtype).to(device)
    data = data_for(candidates)
    specs = [RegularizerSpec(fn=term, weight=0.1) for term in terms]
    tensors = list(torch.split(logprobs, [3, 1, 2, 2]))
    outputs = await Executor.execute_all(specs, data, tensors, track_grad_norms=True)
    assert [output.name for output in outputs] == [term.name for term in terms]
    for term, output in zip(terms, outputs, strict=True):
        leaf = logprobs.clone().requires_grad_()
        loss, metrics = term.compute(data, leaf)
        assert loss.dtype == dtype
        assert output.value == pytest.approx(loss.item(), rel=1e-6), term
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert output.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5), term
        assert output.grad_norm > 0
        assert set(output.custom_metrics) == set(metrics)
        assert all(type(value) in (int, float) for value in output.custom_metrics.values())
    again = await Executor.execute_all(specs, data, tensors, track_grad_norms=True, parallel=False)
    assert again == outputs


@pytest.mark.asyncio
async def test_a_step_on_the_embedded_service_with_another_client_as_reference():
    data = [datum(3, weights=[0.0, 1.0, 1.0]), datum(2, weights=[1.0, 1.0])]
    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        base = await service.create_lora_training_client("tiny", rank=4, seed=2)
        pipeline = Pipeline(
            NLL(reduction="token-mean"),
            [
                RegularizerSpec(fn=SampledKL(reference=base.forward, mask="weights"), weight=0.1),
                RegularizerSpec(fn=SampledEntropy(mask="weights"), weight=0.01),
            ],
        )
        first = await training.forward_backward_custom(data, pipeline)
        await training.optim_step()
        second = await training.forward_backward_custom(data, pipeline)
    # a new LoRA adapter changes nothing yet: the model is its own reference
    assert first.regularizers["sampled_kl"].value == pytest.approx(0.0, abs=1e-9)
    assert second.regularizers["sampled_kl"].value > 0
    assert second.base_loss.value < first.base_loss.value
    assert second.base_loss.metrics == {"tokens": 4.0}
