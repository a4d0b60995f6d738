"""GradientPenalty: closed forms, interpolation and pipelines."""

import math

import pytest
import torch

from tests.regularizers.support import LENGTHS, datum, datums, evaluated, random_logprobs
from tinkex_py import Executor, InvalidData, Pipeline, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.regularizers import L2, GradientPenalty


def cubic(data, logprobs):
    """g = 3 x**2, H = diag(6 x)."""
    return logprobs.pow(3).sum(), {"ignored": 1}


def penalty_by_hand(gradient, lengths, target, reduction="mean"):
    parts = torch.split(gradient, list(lengths))
    penalties = [(math.hypot(*part.flatten().tolist()) - target) ** 2 for part in parts]
    return sum(penalties) / (len(penalties) if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("lengths", [LENGTHS, (8,)])
def test_closed_form_per_datum(reduction, lengths):
    x = random_logprobs(8)
    term = GradientPenalty(fn=L2(), target_norm=1.5, reduction=reduction)
    value, gradient, metrics = evaluated(term, datums(lengths), x)
    assert value.item() == pytest.approx(penalty_by_hand(2 * x, lengths, 1.5, reduction))
    norms = [2 * part.norm() for part in torch.split(x, list(lengths))]
    assert metrics == {"gradient_norm": pytest.approx(sum(norms).item() / len(norms)), "sequences": len(lengths)}
    # 2 (||g|| - t) H g / ||g|| with g = 2 x and H = 2 I
    share = 1 / len(lengths) if reduction == "mean" else 1.0
    slopes = [
        share * 2 * (norm - 1.5) * 2 * (2 * part) / norm
        for part, norm in zip(torch.split(x, list(lengths)), norms, strict=True)
    ]
    torch.testing.assert_close(gradient, torch.cat(slopes))


def test_without_datums_the_tensor_is_one():
    x = random_logprobs(2, 3)
    value, gradient, _ = evaluated(GradientPenalty(fn=cubic), [], x)
    g = 3 * x**2
    assert value.item() == pytest.approx((g.norm().item() - 1) ** 2)
    torch.testing.assert_close(gradient, 2 * (g.norm() - 1) * (6 * x * g) / g.norm())


def test_interpolation_is_one_share_per_datum():
    pair = random_logprobs(8, seed=1).float().double()
    x = random_logprobs(8)
    term = GradientPenalty(fn=cubic, mode="interpolated", reference_field="pair", seed=11)
    value, _, _ = evaluated(term, datums(pair=pair), x)
    shares = torch.rand(3, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    share = torch.repeat_interleave(shares, torch.tensor(LENGTHS))
    point = share * x + (1 - share) * pair
    assert value.item() == pytest.approx(penalty_by_hand(3 * point**2, LENGTHS, 1.0))
    # without a seed two draws differ
    free = term.with_options({"seed": None})
    assert evaluated(free, datums(pair=pair), x)[0] != evaluated(free, datums(pair=pair), x)[0]


def test_a_vanishing_gradient_gives_no_nan():
    value, gradient, _ = evaluated(GradientPenalty(fn=L2(), target_norm=2.0), [], torch.zeros(3))
    assert (value.item(), gradient.tolist()) == (4.0, [0.0, 0.0, 0.0])


@pytest.mark.asyncio
@pytest.mark.parametrize("fn", [NLL(), lambda data, p: torch.tensor(1.0), lambda data, p: p.detach().sum()])
async def test_a_term_without_second_derivative_is_reported_as_not_differentiable(fn):
    tensors = [torch.tensor([-1.0, -2.0, -3.0, -4.0])]
    spec = RegularizerSpec(fn=GradientPenalty(fn=fn, target_norm=1.0), weight=0.5)
    output = await Executor.execute_one(spec, [datum(4)], tensors, track_grad_norms=True)
    # NLL's gradient is -1 four times, of length 2; the constants have none
    assert output.value == pytest.approx(1.0)
    assert (output.differentiable, output.grad_norm) == (False, 0.0)


@pytest.mark.asyncio
async def test_in_a_pipeline_in_a_thread():
    tensors = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    spec = RegularizerSpec(fn=GradientPenalty(fn=L2(), target_norm=0.0), weight=0.5)
    data = datums((2, 1))
    output = await Pipeline(NLL(), [spec], track_grad_norms=True).compute(data, tensors)
    regularizer = output.regularizers["gradient_penalty"]
    # mean over datums of 4 |x|**2: (20 + 36) / 2, with gradient 8 x / 2
    assert regularizer.value == pytest.approx(28.0)
    assert regularizer.grad_norm == pytest.approx(4 * math.sqrt(14), rel=1e-6)


def test_it_works_under_no_grad_and_on_a_plain_tensor():
    with torch.no_grad():
        loss, _ = GradientPenalty(fn=L2()).compute([], torch.tensor([-3.0, -4.0]))
    assert loss.item() == 81.0


def test_the_reference_field_is_required():
    term = GradientPenalty(fn=L2(), mode="interpolated", reference_field="pair")
    with pytest.raises(InvalidData, match="datum 0 has no 'pair'"):
        term.compute(datums(), random_logprobs(8))
