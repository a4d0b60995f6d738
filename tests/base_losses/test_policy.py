"""ImportanceSampling, PPO and CISPO, against formulas written out token by token."""

import math

import pytest
import torch

from tests.regularizers.support import datum, datums, evaluated, random_logprobs
from tinkex_py import InvalidData
from tinkex_py.base_losses import CISPO, PPO, ImportanceSampling
from tinkex_py.local.losses import find_loss

P = [-1.0, -0.5, -2.0, -1.0, -0.7, -3.0, -0.2, -1.5]
Q = [-1.5, -0.6, -1.0, -1.0, -0.2, -1.5, -1.7, -1.6]
A = [-1.0, -2.0, 1.5, 0.0, -1.0, -0.5, 2.0, 1.0]
MASK = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
TERMS = [ImportanceSampling(), PPO(), CISPO(), CISPO(clip_low_threshold=0.5, clip_high_threshold=1.3)]


def data_of(p=P, q=Q, a=A, mask=None):
    return datums(logprobs=torch.tensor(q), advantages=torch.tensor(a), weights=torch.tensor(mask or [1.0] * 8))


def by_hand(term, p, q, a):
    """Loss of one token and its slope."""
    ratio = math.exp(p - q)
    if isinstance(term, ImportanceSampling):
        return -ratio * a, -ratio * a
    low, high = term.clip_low_threshold, term.clip_high_threshold
    clipped = min(max(ratio, low), high)
    if isinstance(term, CISPO):
        return -clipped * p * a, -clipped * a
    stopped = (a > 0 and ratio > high) or (a < 0 and ratio < low)
    return -min(ratio * a, clipped * a), 0.0 if stopped else -ratio * a


def float32(numbers):
    return torch.tensor(numbers).double()


@pytest.mark.parametrize("term", TERMS, ids=repr)
@pytest.mark.parametrize("mask", [None, MASK])
def test_values_and_gradients_token_by_token(term, mask):
    term = term.with_options({"mask": "weights" if mask else None})
    value, gradient, metrics = evaluated(term, data_of(mask=mask), float32(P))
    tokens = [by_hand(term, *numbers) for numbers in zip(*(float32(x).tolist() for x in (P, Q, A)), strict=True)]
    weights = mask or [1.0] * 8
    assert value.item() == pytest.approx(sum(w * loss for w, (loss, _) in zip(weights, tokens, strict=True)))
    assert gradient.tolist() == pytest.approx([w * slope for w, (_, slope) in zip(weights, tokens, strict=True)])
    assert metrics["tokens"] == sum(weights)


@pytest.mark.parametrize(
    ("term", "name"), [(ImportanceSampling(), "importance_sampling"), (PPO(), "ppo"), (CISPO(), "cispo")]
)
def test_they_equal_the_embedded_services_own_losses(term, name):
    p = torch.tensor(P, requires_grad=True)
    inputs = {"logprobs": torch.tensor(Q), "advantages": torch.tensor(A)}
    expected = find_loss(name, {}).compute(p, inputs).value
    (slope,) = torch.autograd.grad(expected, p)
    value, gradient, _ = evaluated(term, data_of(), torch.tensor(P))
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, slope)


def test_metrics_are_means_over_the_mask():
    _, _, metrics = evaluated(PPO(mask="weights"), data_of(mask=MASK), float32(P))
    counted = [(p, q, a) for p, q, a, w in zip(*(float32(x).tolist() for x in (P, Q, A, MASK)), strict=True) if w]
    ratios = [math.exp(p - q) for p, q, _ in counted]
    assert metrics["mean_ratio"].item() == pytest.approx(sum(ratios) / 6)
    assert metrics["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 6)
    stopped = [(a > 0 and r > 1.2) or (a < 0 and r < 0.8) for (_, _, a), r in zip(counted, ratios, strict=True)]
    assert metrics["clip_fraction"].item() == pytest.approx(sum(stopped) / 6)
    _, _, metrics = evaluated(CISPO(), data_of(), float32(P))
    assert metrics["clip_fraction"].item() == pytest.approx(
        sum(math.exp(p - q) > 4.0 for p, q in zip(P, Q, strict=True)) / 8
    )
    _, _, metrics = evaluated(ImportanceSampling(), data_of(), float32(P))
    assert set(metrics) == {"mean_ratio", "approx_kl", "tokens"}


@pytest.mark.parametrize("term", TERMS, ids=repr)
@pytest.mark.parametrize("difference", [-200.0, -1.0, 0.0, 19.0, 21.0, 200.0])
@pytest.mark.parametrize("advantage", [-10.0, 0.0, 1.0])
def test_nothing_overflows(term, difference, advantage):
    data = [datum(1, logprobs=[-250.0 - difference], advantages=[advantage])]
    value, gradient, _ = evaluated(term, data, torch.tensor([-250.0]))
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert gradient.item() * advantage <= 0  # it never pushes against the advantage


def test_beyond_e20_the_ratio_continues_as_its_tangent():
    data = [datum(1, logprobs=[-31.0], advantages=[-1.0])]
    value, gradient, _ = evaluated(ImportanceSampling(), data, torch.tensor([-1.0], dtype=torch.float64))
    assert value.item() == pytest.approx(math.exp(20) * 11)
    assert gradient.item() == pytest.approx(math.exp(20))


def test_other_names_of_fields():
    data = [datum(2, old=[-1.0, -1.0], gain=[1.0, 2.0])]
    term = ImportanceSampling(logprobs_field="old", advantages_field="gain")
    assert evaluated(term, data, torch.tensor([-1.0, -1.0]))[0].item() == -3.0


def test_errors():
    logprobs = random_logprobs(8)
    with pytest.raises(InvalidData, match="datum 0 has no 'logprobs'"):
        PPO().compute(datums(advantages=A), logprobs)
    data = [datum(2, logprobs=[-1.0, -1.0], advantages=[1.0]), datum(1, logprobs=[-1.0], advantages=[1.0])]
    with pytest.raises(InvalidData, match=r"'advantages' of datum 0 has shape \(1,\), but .* \(2,\)"):
        CISPO().compute(data, random_logprobs(3))
    with pytest.raises(InvalidData, match=r"PPO needs sampled tokens, .* shape \(8, 3\): pass \[T\] targets"):
        PPO().compute(datums(candidates=3), random_logprobs(8, 3))
