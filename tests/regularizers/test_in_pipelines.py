"""Every ready-made term in worker threads: packed leaves and both dtypes."""

import pytest
import torch

from tests.losses.devices import DEVICES
from tests.regularizers.support import datums, random_logprobs
from tinkex_py import Executor, RegularizerSpec
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
    GradientPenalty(fn=L2(mask=None)),
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
        pytest.skip("the device does not support float64")
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
