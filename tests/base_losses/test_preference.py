"""DPO, against the formula written out pair by pair."""

import math

import pytest
import torch

from tests.regularizers.support import datums, evaluated, random_logprobs
from tinkex_py import InvalidData, Pipeline
from tinkex_py.base_losses import DPO

LENGTHS = (3, 1, 2, 2)
WEIGHTS = [0.0, 1.0, 0.5, 1.0, 0.0, 1.0, 2.0, 1.0]
MODEL = random_logprobs(8)
REFERENCE = random_logprobs(8, seed=1).float().double()
FIELD = {"reference_field": "reference_logprobs"}


def data_of(weights=WEIGHTS):
    fields = {} if weights is None else {"weights": weights}
    return datums(LENGTHS, reference_logprobs=REFERENCE, **fields)


def rewards_by_hand(beta, weights=WEIGHTS):
    numbers = zip(weights, (MODEL - REFERENCE).tolist(), strict=True)
    products = torch.tensor([w * d for w, d in numbers], dtype=torch.float64)
    return [beta * part.sum().item() for part in torch.split(products, list(LENGTHS))]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_formula(reduction, smoothing):
    beta = 0.7
    term = DPO(**FIELD, beta=beta, reduction=reduction, label_smoothing=smoothing)
    value, gradient, metrics = evaluated(term, data_of(), MODEL)
    rewards = rewards_by_hand(beta)
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3]]
    losses = [-(1 - smoothing) * math.log(sigmoid(z)) - smoothing * math.log(sigmoid(-z)) for z in margins]
    share = 0.5 if reduction == "mean" else 1.0
    assert value.item() == pytest.approx(share * sum(losses))
    pulls = [share * beta * (sigmoid(-z) - smoothing) for z in margins]
    per_datum = [-pulls[0], pulls[0], -pulls[1], pulls[1]]
    expected = torch.repeat_interleave(torch.tensor(per_datum, dtype=torch.float64), torch.tensor(LENGTHS))
    torch.testing.assert_close(gradient, expected * torch.tensor(WEIGHTS).double())
    weighted = torch.tensor(WEIGHTS).double() * MODEL
    sums = [part.sum().item() for part in torch.split(weighted, list(LENGTHS))]
    assert metrics == {
        "accuracy": pytest.approx(sum(z > 0 for z in margins) / 2),
        "margin": pytest.approx(sum(margins) / 2),
        "chosen_reward": pytest.approx((rewards[0] + rewards[2]) / 2),
        "rejected_reward": pytest.approx((rewards[1] + rewards[3]) / 2),
        "chosen_logprob": pytest.approx((sums[0] + sums[2]) / 2),
        "rejected_logprob": pytest.approx((sums[1] + sums[3]) / 2),
        "pairs": 2.0,
    }


def test_the_loss_of_the_reference_is_log_2():
    value, _, metrics = evaluated(DPO(**FIELD), data_of(), REFERENCE)
    assert value.item() == pytest.approx(math.log(2))
    assert metrics["margin"] == 0


def test_data_without_weights_has_weight_1():
    value, _, _ = evaluated(DPO(**FIELD, beta=1.0), data_of(weights=None), MODEL)
    rewards = rewards_by_hand(1.0, [1.0] * 8)
    expected = [-math.log(sigmoid(rewards[0] - rewards[1])), -math.log(sigmoid(rewards[2] - rewards[3]))]
    assert value.item() == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_huge_margins_stay_finite(scale):
    for sign in (1.0, -1.0):
        model = REFERENCE + sign * scale * torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
        value, gradient, _ = evaluated(DPO(**FIELD, beta=10.0), data_of(), model.float())
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.asyncio
async def test_as_the_base_loss_with_an_async_reference():
    async def frozen(data):
        return [part.float() for part in torch.split(REFERENCE, list(LENGTHS))]

    tensors = list(torch.split(MODEL.float(), list(LENGTHS)))
    output = await Pipeline(DPO(reference=frozen)).compute(data_of(), tensors)
    expected, _, _ = evaluated(DPO(**FIELD), data_of(), MODEL)
    assert output.loss_total == pytest.approx(expected.item(), rel=1e-6)
    assert output.base_loss.metrics["pairs"] == 2.0


def test_errors():
    with pytest.raises(InvalidData, match=r"DPO needs datums in pairs \(chosen, rejected, .*\), got 3"):
        DPO(reference=MODEL[:6]).compute(datums(LENGTHS[:3]), MODEL[:6])
    with pytest.raises(InvalidData, match="got 0"):
        DPO(reference=MODEL).compute([], MODEL)
    with pytest.raises(InvalidData, match="DPO needs sampled tokens"):
        DPO(reference=random_logprobs(8, 3)).compute(datums(LENGTHS, 3), random_logprobs(8, 3))
