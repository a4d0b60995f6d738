"""L1, L2 and ElasticNet."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.losses.support import guide_logprobs
from tests.regularizers.support import LENGTHS, datum, datums, evaluated, finite_differences, loss_of, random_logprobs
from tinkex_py import Executor, InvalidData, RegularizerSpec
from tinkex_py.regularizers import L1, L2, ElasticNet

NEGATIVE = torch.tensor([-0.5, -1.2, -0.8], dtype=torch.float64)


def test_the_guides_numbers():
    value, gradient, metrics = evaluated(L1(), [], guide_logprobs())
    assert value.item() == pytest.approx(4.9, rel=1e-6)
    assert gradient.norm().item() == pytest.approx(math.sqrt(5), rel=1e-6)
    assert metrics == {"tokens": 5.0}
    value, gradient, _ = evaluated(L2(), [], guide_logprobs())
    assert value.item() == pytest.approx(6.83, rel=1e-6)
    assert gradient.norm().item() == pytest.approx(2 * math.sqrt(6.83), rel=1e-6)  # 2 |x|
    value, _, _ = evaluated(ElasticNet(l1_ratio=0.25), [], guide_logprobs())
    assert value.item() == pytest.approx(0.25 * 4.9 + 0.75 * 6.83, rel=1e-6)


@pytest.mark.asyncio
async def test_the_guides_weights_and_names():
    specs = [RegularizerSpec(fn=L1(), weight=0.01), RegularizerSpec(fn=L2(), weight=0.005)]
    l1, l2 = await Executor.execute_all(specs, [], guide_logprobs(), track_grad_norms=True)
    assert (l1.name, l2.name) == ("l1_sparsity", "l2_weight_decay")
    assert l1.contribution == pytest.approx(0.049, rel=1e-6)
    assert l2.contribution == pytest.approx(0.03415, rel=1e-6)
    assert l2.grad_norm == pytest.approx(5.2268537, rel=1e-6)


def test_gradients_are_the_documented_ones():
    _, gradient, _ = evaluated(L1(), [], torch.tensor([-2.0, 0.0, 3.0]))
    assert gradient.tolist() == [-1.0, 0.0, 1.0]
    _, gradient, _ = evaluated(L2(), [], torch.tensor([-2.0, 0.0, 3.0]))
    assert gradient.tolist() == [-4.0, 0.0, 6.0]
    _, gradient, _ = evaluated(ElasticNet(l1_ratio=0.25), [], torch.tensor([-2.0, 0.0, 3.0]))
    assert gradient.tolist() == [0.25 * -1 + 1.5 * -2, 0.0, 0.25 + 1.5 * 3]


@pytest.mark.parametrize("term", [L1(), L2(), ElasticNet(l1_ratio=0.3)])
def test_probabilities_as_target(term):
    value, gradient, _ = evaluated(term, [], NEGATIVE, target="probs")
    p = [math.exp(x) for x in NEGATIVE.tolist()]
    a = {L1: 1.0, L2: 0.0, ElasticNet: 0.3}[type(term)]
    assert value.item() == pytest.approx(sum(a * x + (1 - a) * x * x for x in p))
    # d exp(x) / dx is exp(x): the chain rule by hand
    assert gradient.tolist() == pytest.approx([(a + 2 * (1 - a) * x) * x for x in p])


@pytest.mark.parametrize("lengths", [LENGTHS, (8,)])
def test_a_field_as_target_counts_without_gradient(lengths):
    field = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 0.0, 1.0, -1.0])
    data = datums(lengths, activations=field)
    leaf = random_logprobs(8).requires_grad_()
    loss, _ = L1(target="activations").compute(data, leaf)
    assert loss.item() == pytest.approx(8.5)
    assert not loss.requires_grad
    loss, _ = L2(target="activations", center="mean").compute(data, leaf)
    mean = field.mean()
    assert loss.item() == pytest.approx(((field - mean) ** 2).sum().item())


@pytest.mark.asyncio
async def test_a_field_as_target_is_reported_as_not_differentiable():
    data = datums(activations=[1.0] * 8)
    spec = RegularizerSpec(fn=L1(target="activations"), weight=0.5)
    output = await Executor.execute_one(spec, data, random_logprobs(8), track_grad_norms=True)
    assert (output.contribution, output.grad_norm, output.differentiable) == (4.0, 0.0, False)


def test_center_as_a_number_the_mean_and_a_field():
    x = torch.tensor([1.0, 2.0, 3.0])
    value, gradient, _ = evaluated(L2(center=1.0), [], x)
    assert (value.item(), gradient.tolist()) == (5.0, [0.0, 2.0, 4.0])
    value, gradient, _ = evaluated(L2(center="mean"), [], x)
    # the mean moves along, but the deviations sum to 0, so that this adds nothing
    assert (value.item(), gradient.tolist()) == (2.0, [-2.0, 0.0, 2.0])
    data = datums((3,), before=[0.0, 2.0, 5.0])
    value, gradient, _ = evaluated(L2(center="before"), data, x)
    assert (value.item(), gradient.tolist()) == (5.0, [2.0, 0.0, -4.0])


def test_the_mean_is_that_of_what_counts():
    data = datums((4,), mask=[1.0, 1.0, 0.0, 1.0])
    value, gradient, _ = evaluated(L2(center="mean", mask="mask"), data, torch.tensor([1.0, 2.0, 100.0, 3.0]))
    assert (value.item(), gradient.tolist()) == (2.0, [-2.0, 0.0, 0.0, 2.0])


def test_clip_limits_value_and_gradient():
    value, gradient, _ = evaluated(L2(clip=2.0), [], torch.tensor([-3.0, 1.0, 2.5]))
    assert (value.item(), gradient.tolist()) == (4.0 + 1.0 + 4.0, [0.0, 2.0, 0.0])
    value, gradient, _ = evaluated(L2(clip=2.0, center=-2.0), [], torch.tensor([-3.0, 1.0, -2.5]))
    assert (value.item(), gradient.tolist()) == (1.0 + 4.0 + 0.25, [-2.0, 0.0, -1.0])


TERMS = [
    L1(),
    L1(target="probs", reduction="mean"),
    L2(),
    L2(center="mean", clip=1.0, reduction="seq-mean-token-mean"),
    L2(target="probs", mask="weights", reduction="token-mean"),
    ElasticNet(l1_ratio=0.7, reduction="seq-mean-token-sum", mask="weights"),
]


@pytest.mark.parametrize("term", TERMS, ids=repr)
@pytest.mark.parametrize("candidates", [None, 3])
def test_gradients(term, candidates):
    shape = (8,) if candidates is None else (8, candidates)
    data = datums(candidates=candidates, weights=[1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 0.0, 1.0])
    logprobs = random_logprobs(*shape)
    assert gradcheck(loss_of(term, data), logprobs.clone().requires_grad_())
    assert gradgradcheck(loss_of(term, data), logprobs.clone().requires_grad_())
    _, gradient, _ = evaluated(term, data, logprobs)
    torch.testing.assert_close(gradient, finite_differences(loss_of(term, data), logprobs), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4)])
@pytest.mark.parametrize("term", [L1(), L2(center="mean"), ElasticNet(reduction="mean")])
def test_any_shape(term, shape):
    x = torch.full(shape, -0.5)
    value, gradient, metrics = evaluated(term, [], x)
    assert torch.isfinite(value)
    assert gradient.shape == shape
    assert metrics["tokens"] == x.numel()


def test_float64_stays_float64():
    value, gradient, _ = evaluated(L2(), [], torch.tensor([1e-9], dtype=torch.float64))
    assert value.dtype == gradient.dtype == torch.float64
    assert value.item() == pytest.approx(1e-18)


@pytest.mark.parametrize("term", [L1(target="before"), L2(center="before")])
def test_errors_name_the_datum_the_field_and_both_shapes(term):
    logprobs = random_logprobs(8)
    with pytest.raises(InvalidData, match="datum 0 has no 'before'"):
        term.compute(datums(), logprobs)
    data = datums(before=[0.0] * 8)
    data[1] = datum(1, before=[0.0, 0.0])
    with pytest.raises(InvalidData, match=r"'before' of datum 1 has shape \(2,\), its logprobs have shape \(1,\)"):
        term.compute(data, logprobs)
    with pytest.raises(InvalidData, match="no datum to take 'before' from"):
        term.compute([], logprobs)
