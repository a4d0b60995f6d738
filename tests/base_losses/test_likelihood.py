"""NLL."""

import pytest
import torch

from tests.regularizers.support import LENGTHS, datum, datums, evaluated, random_logprobs
from tinkex_py import InvalidData, Pipeline
from tinkex_py.base_losses import NLL

WEIGHTS = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 2.0, 1.0]


def test_it_is_the_services_cross_entropy():
    logprobs = random_logprobs(8)
    value, gradient, metrics = evaluated(NLL(), datums(weights=WEIGHTS), logprobs)
    assert value.item() == pytest.approx(-sum(w * x for w, x in zip(WEIGHTS, logprobs.tolist(), strict=True)))
    assert gradient.tolist() == [-w for w in WEIGHTS]
    assert metrics == {"tokens": 6.5}


def test_data_without_weights_has_weight_1():
    logprobs = random_logprobs(8)
    for data in ([], datums()):
        value, _, metrics = evaluated(NLL(), data, logprobs)
        assert value.item() == pytest.approx(-logprobs.sum().item())
        assert metrics == {"tokens": 8.0}
    value, _, _ = evaluated(NLL(mask=None), datums(weights=WEIGHTS), logprobs)
    assert value.item() == pytest.approx(-logprobs.sum().item())


def test_weights_on_some_datums_only_raise():
    data = [datum(3, weights=[1.0] * 3), datum(1), datum(4)]
    with pytest.raises(InvalidData, match="datum 1 has no 'weights' in loss_fn_inputs, but other datums have it"):
        NLL().compute(data, random_logprobs(8))


def test_candidates_have_weights_of_their_own():
    logprobs, weights = random_logprobs(8, 3), random_logprobs(8, 3, seed=1).exp().float().double()
    value, gradient, _ = evaluated(NLL(), datums(candidates=3, weights=weights), logprobs)
    assert value.item() == pytest.approx(-(weights * logprobs).sum().item())
    torch.testing.assert_close(gradient, -weights)


@pytest.mark.asyncio
async def test_as_the_base_loss_of_a_pipeline():
    tensors = list(torch.split(random_logprobs(8).float(), list(LENGTHS)))
    output = await Pipeline(NLL(reduction="token-mean")).compute(datums(weights=WEIGHTS), tensors)
    assert output.base_loss.metrics == {"tokens": 6.5}
    guide = await Pipeline(NLL(reduction="mean"), track_grad_norms=True).compute(
        [], torch.tensor([-0.5, -1.2, -0.8, -2.1, -0.3])
    )
    assert guide.loss_total == pytest.approx(0.98)
    assert guide.base_loss.grad_norm == pytest.approx(0.4472136, rel=1e-6)
