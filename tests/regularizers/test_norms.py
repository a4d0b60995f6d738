"""L1, L2 and ElasticNet."""

import math

import pytest
import torch

from tests.losses.support import guide_logprobs
from tests.regularizers.support import LENGTHS, datum, datums, evaluated, random_logprobs
from tinkex_py import Executor, InvalidData, RegularizerSpec
from tinkex_py.regularizers import L1, L2, ElasticNet

X = torch.tensor([-2.0, 0.0, 3.0])
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


@pytest.mark.parametrize(
    ("term", "x", "value", "gradient"),
    [
        (L1(), X, 5.0, [-1.0, 0.0, 1.0]),
        (L2(), X, 13.0, [-4.0, 0.0, 6.0]),
        (ElasticNet(l1_ratio=0.25), X, 11.0, [0.25 * -1 + 1.5 * -2, 0.0, 0.25 + 1.5 * 3]),
        (L2(center=1.0), torch.tensor([1.0, 2.0, 3.0]), 5.0, [0.0, 2.0, 4.0]),
        # The gradient of the mean adds nothing, because the deviations sum to 0.
        (L2(center="mean"), torch.tensor([1.0, 2.0, 3.0]), 2.0, [-2.0, 0.0, 2.0]),
        (L2(center="before"), torch.tensor([1.0, 2.0, 3.0]), 5.0, [2.0, 0.0, -4.0]),
        (L2(center="mean", mask="mask"), torch.tensor([1.0, 100.0, 3.0]), 2.0, [-2.0, 0.0, 2.0]),
        (L2(clip=2.0), torch.tensor([-3.0, 1.0, 2.5]), 9.0, [0.0, 2.0, 0.0]),
        (L2(clip=2.0, center=-2.0), torch.tensor([-3.0, 1.0, -2.5]), 5.25, [-2.0, 0.0, -1.0]),
    ],
)
def test_values_and_gradients_by_hand(term, x, value, gradient):
    data = datums((3,), before=[0.0, 2.0, 5.0], mask=[1.0, 0.0, 1.0])
    loss, slopes, _ = evaluated(term, data, x)
    assert (loss.item(), slopes.tolist()) == (value, gradient)


@pytest.mark.parametrize("term", [L1(), L2(), ElasticNet(l1_ratio=0.3)])
def test_probabilities_as_target(term):
    value, gradient, _ = evaluated(term, [], NEGATIVE, target="probs")
    p = [math.exp(x) for x in NEGATIVE.tolist()]
    a = {L1: 1.0, L2: 0.0, ElasticNet: 0.3}[type(term)]
    assert value.item() == pytest.approx(sum(a * x + (1 - a) * x * x for x in p))
    # d exp(x) / dx is exp(x): the chain rule by hand
    assert gradient.tolist() == pytest.approx([(a + 2 * (1 - a) * x) * x for x in p])


@pytest.mark.asyncio
@pytest.mark.parametrize("lengths", [LENGTHS, (8,)])
async def test_a_field_as_target_is_a_constant(lengths):
    field = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 0.0, 1.0, -1.0])
    data = datums(lengths, activations=field)
    spec = RegularizerSpec(fn=L1(target="activations"), weight=0.5)
    output = await Executor.execute_one(spec, data, random_logprobs(8), track_grad_norms=True)
    assert (output.contribution, output.grad_norm, output.differentiable) == (4.25, 0.0, False)
    loss, _ = L2(target="activations", center="mean").compute(data, random_logprobs(8))
    assert loss.item() == pytest.approx(((field - field.mean()) ** 2).sum().item())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4)])
@pytest.mark.parametrize("term", [L1(), L2(center="mean"), ElasticNet(reduction="mean")])
def test_any_shape(term, shape):
    x = torch.full(shape, -0.5, dtype=torch.float64)
    value, gradient, metrics = evaluated(term, [], x)
    assert torch.isfinite(value)
    assert gradient.shape == shape
    assert gradient.dtype == value.dtype == torch.float64
    assert metrics["tokens"] == x.numel()


@pytest.mark.parametrize("term", [L1(target="before"), L2(center="before")])
def test_errors_name_the_datum_the_field_and_both_shapes(term):
    logprobs = random_logprobs(8)
    with pytest.raises(InvalidData, match="datum 0 has no 'before'"):
        term.compute(datums(), logprobs)
    data = datums(before=[0.0] * 8)
    data[1] = datum(1, before=[0.0, 0.0])
    with pytest.raises(InvalidData, match=r"'before' of datum 1 has shape \(2,\), but its logprobs have shape \(1,\)"):
        term.compute(data, logprobs)
    with pytest.raises(InvalidData, match="the term reads the field 'before', but data is empty"):
        term.compute([], logprobs)
