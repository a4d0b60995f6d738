"""Estimates from sampled tokens: closed forms, and exact expectations over a categorical distribution."""

import math
from typing import get_args

import pytest
import torch

from tests.regularizers.support import datum, datums, evaluated, random_logprobs
from tinkex_py import InvalidData, NonFiniteLoss, Pipeline
from tinkex_py.regularizers import SampledEntropy, SampledKL
from tinkex_py.regularizers.sampled import Estimator

ESTIMATORS = get_args(Estimator)
LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()


def expected(term, logits):
    """Mean of value and of gradient in the logits, exactly: every outcome, weighed by its probability.

    Each outcome is one sampled token; its gradient goes through the model's log-softmax as it does in training.
    """
    probabilities = logits.detach().softmax(0)
    value, gradient = 0.0, torch.zeros_like(logits)
    for outcome, probability in enumerate(probabilities.tolist()):
        leaf = logits.detach().clone().requires_grad_()
        chosen = leaf.log_softmax(0)[outcome : outcome + 1]
        if isinstance(term, SampledKL):
            term = term.with_options({"reference": REFERENCE[outcome : outcome + 1]})
        loss, _ = term.compute([], chosen)
        value += probability * loss.item()
        gradient += probability * torch.autograd.grad(loss, leaf)[0]
    return value, gradient


def exact(function):
    """Value and gradient of a function of the logits' log-softmax, written out."""
    leaf = LOGITS.clone().requires_grad_()
    value = function(leaf.log_softmax(0))
    return value.item(), torch.autograd.grad(value, leaf)[0]


def kl_model_reference(log_p):
    return (log_p.exp() * (log_p - REFERENCE)).sum()


def kl_reference_model(log_p):
    return (REFERENCE.exp() * (REFERENCE - log_p)).sum()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bias_of_value_and_gradient(estimator):
    """The table of the docstring: which values and gradients are right on average."""
    value, gradient = expected(SampledKL(reference=REFERENCE, estimator=estimator), LOGITS)
    true_value, true_gradient = exact(kl_model_reference)
    unbiased_value = estimator.removesuffix("+") in ("k1", "k3")
    assert (abs(value - true_value) < 1e-12) == unbiased_value
    if not unbiased_value:
        assert abs(value - true_value) > 1e-3
    if estimator == "k1":
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    elif estimator == "k3":
        torch.testing.assert_close(gradient, exact(kl_reference_model)[1])
    if estimator == "k2" or estimator.endswith("+"):
        torch.testing.assert_close(gradient, true_gradient)
    else:
        assert not torch.allclose(gradient, true_gradient, atol=1e-3)


@pytest.mark.parametrize("mode", ["maximize", "minimize"])
def test_the_sampled_entropy_is_unbiased_in_value_and_gradient(mode):
    sign = -1.0 if mode == "maximize" else 1.0
    value, gradient = expected(SampledEntropy(mode=mode), LOGITS)
    entropy, slope = exact(lambda log_p: -(log_p.exp() * log_p).sum())
    assert value == pytest.approx(sign * entropy)
    torch.testing.assert_close(gradient, sign * slope)


DIFFERENCES = torch.tensor([0.5, -0.25, 0.0, -2.0], dtype=torch.float64)
CLOSED_FORMS = {
    "k1": (lambda d: d, lambda d: 1.0),
    "k2": (lambda d: d * d / 2, lambda d: d),
    "k3": (lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    "abs": (abs, lambda d: (d > 0) - (d < 0)),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_closed_forms(estimator):
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    value_of, slope_of = CLOSED_FORMS[estimator.removesuffix("+")]
    term = SampledKL(reference=logprobs - DIFFERENCES, estimator=estimator, reduction="mean")
    value, gradient, metrics = evaluated(term, [], logprobs)
    assert value.item() == pytest.approx(sum(map(value_of, DIFFERENCES.tolist())) / 4)
    slopes = DIFFERENCES.tolist() if estimator.endswith("+") else [slope_of(d) for d in DIFFERENCES.tolist()]
    assert gradient.tolist() == pytest.approx([slope / 4 for slope in slopes])
    assert metrics == {"tokens": 4.0}


def test_the_sampled_entropys_closed_form():
    value, gradient, metrics = evaluated(SampledEntropy(), [], torch.tensor([-1.0, -2.0]))
    assert (value.item(), gradient.tolist()) == (-3.0, [-1.0, -2.0])
    assert metrics == {"entropy": 3.0, "tokens": 2.0}
    value, gradient, metrics = evaluated(SampledEntropy(mode="minimize"), [], torch.tensor([-1.0, -2.0]))
    assert (value.item(), gradient.tolist()) == (3.0, [1.0, 2.0])
    assert metrics == {"entropy": 3.0, "tokens": 2.0}


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("difference", [-60.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 60.0])
def test_values_are_never_negative_and_never_overflow(estimator, dtype, difference):
    logprobs = torch.tensor([-70.0], dtype=dtype)
    value, gradient, _ = evaluated(SampledKL(reference=logprobs - difference, estimator=estimator), [], logprobs)
    assert value >= (0.0 if estimator != "k3" else -1e-6)
    assert torch.isfinite(value)
    # the pull is always to the reference
    assert torch.isfinite(gradient).all()
    assert gradient.item() * difference >= 0


def test_k3_keeps_its_digits_near_zero():
    value, _, _ = evaluated(
        SampledKL(reference=torch.tensor([-1.0]), estimator="k3"), [], torch.tensor([-1.0009765625])
    )
    assert value.item() == pytest.approx(0.0009765625**2 / 2, rel=1e-3)


def test_far_from_the_reference_k3_continues_as_its_tangent():
    logprobs = torch.tensor([-150.0], dtype=torch.float64)
    value, gradient, _ = evaluated(SampledKL(reference=torch.tensor([-1.0]), estimator="k3"), [], logprobs)
    slope = math.exp(20)
    assert value.item() == pytest.approx(slope * (1 + 129) - 1 - 149)
    assert gradient.item() == pytest.approx(1 - slope)


@pytest.mark.asyncio
async def test_infinity_raises_only_inside_of_the_mask():
    tensors = [torch.tensor([-torch.inf, -1.0])]
    fields = {"reference_logprobs": [-1.0, -1.5], "weights": [0.0, 1.0]}
    term = SampledKL(reference_field="reference_logprobs", mask="weights")
    output = await Pipeline(term).compute([datum(2, **fields)], tensors)
    assert output.loss_total == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    with pytest.raises(NonFiniteLoss, match="base_loss"):
        await Pipeline(term.with_options({"mask": None})).compute([datum(2, **fields)], tensors)


@pytest.mark.parametrize("term", [SampledKL(reference_field="reference_logprobs"), SampledEntropy()])
def test_candidates_are_not_samples(term):
    logprobs = random_logprobs(8, 3)
    data = datums(candidates=3, reference_logprobs=logprobs)
    with pytest.raises(InvalidData, match=r"needs sampled tokens, one number per position, .* shape \(8, 3\): use "):
        term.compute(data, logprobs)
    # the last axis of a tensor given directly need not be candidates
    padded = SampledEntropy().compute([], logprobs)[0]
    assert padded.item() == pytest.approx(logprobs.sum().item())
