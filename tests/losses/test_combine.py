"""What is made of the terms' gradients: clipping, gradient surgery, and the diagnosis."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.losses.support import guide_logprobs, guide_specs, nll, spec
from tinkex_py import Executor, NonFiniteLoss, Pipeline
from tinkex_py.losses.gradients import WeightedGradient, dot, summed, without_conflicts
from tinkex_py.losses.logprobs import Logprobs


def linear(*factors: float) -> Any:
    """A term whose gradient is these numbers."""
    gradient = torch.tensor(factors)

    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return (logprobs * gradient).sum()

    return term


def gradient_of(pipeline: Pipeline, *, step: int = 0) -> Any:
    async def evaluate() -> torch.Tensor:
        size = 2
        loss = await pipeline.evaluate([], Logprobs.from_tensors(torch.full((size,), -1.0)), step=step)
        return loss.gradient

    return evaluate()


@pytest.mark.asyncio
async def test_the_diagnosis_by_hand():
    # Base (3, 4), regularizer 2 * (-1, 0): total (1, 4).
    pipeline = Pipeline(linear(3.0, 4.0), [spec(linear(-1.0, 0.0), "r", 2.0)], track_grad_norms=True)
    output = await pipeline.compute([], torch.zeros(2))
    assert output.total_grad_norm == pytest.approx(math.sqrt(17))
    base, own = output.diagnosis["base_loss"], output.diagnosis["r"]
    assert base.cosine_with_base == pytest.approx(1.0)
    assert base.cosine_with_total == pytest.approx(19 / (5 * math.sqrt(17)))
    assert base.share_of_total == pytest.approx(19 / 17)
    assert base.conflicts is False
    assert own.cosine_with_base == pytest.approx(-3 / 5)
    assert own.cosine_with_total == pytest.approx(-1 / math.sqrt(17))
    assert own.share_of_total == pytest.approx(-2 / 17)
    assert own.conflicts is True


@pytest.mark.asyncio
async def test_no_diagnosis_unless_norms_are_tracked():
    assert (await Pipeline(nll, guide_specs()).compute([], guide_logprobs())).diagnosis == {}
    untracked = Pipeline(nll, guide_specs(), combine="pcgrad")
    assert (await untracked.compute([], guide_logprobs())).diagnosis == {}


@pytest.mark.asyncio
async def test_where_a_gradient_is_zero_there_is_no_cosine():
    constant = spec(lambda data, logprobs: torch.tensor(1.0), "constant")
    output = await Pipeline(linear(1.0, 0.0), [constant], track_grad_norms=True).compute([], torch.zeros(2))
    diagnosis = output.diagnosis["constant"]
    assert diagnosis.cosine_with_base is diagnosis.cosine_with_total is diagnosis.conflicts is None
    assert diagnosis.share_of_total == 0.0
    cancelled = Pipeline(linear(1.0, 2.0), [spec(linear(-1.0, -2.0), "opposite")], track_grad_norms=True)
    for combine in ("sum", "pcgrad"):
        cancelled.combine = combine
        output = await cancelled.compute([], torch.zeros(2))
        assert output.total_grad_norm == pytest.approx(0.0, abs=1e-7)
        assert output.diagnosis["opposite"].cosine_with_base == pytest.approx(-1.0)
        assert output.diagnosis["opposite"].share_of_total is None


@pytest.mark.asyncio
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
async def test_shares_add_up_and_agree_with_numpy(seed: int, count: int):
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((count + 1, 6))
    weights = [1.0, *draw.uniform(0.1, 2.0, count)]
    specs = [spec(linear(*row), f"r{index}", weights[index + 1]) for index, row in enumerate(rows[1:])]
    for combine in ("sum", "pcgrad"):
        pipeline = Pipeline(linear(*rows[0]), specs, track_grad_norms=True, combine=combine)
        output = await pipeline.compute([], torch.zeros(6))
        shares = [diagnosis.share_of_total for diagnosis in output.diagnosis.values()]
        assert sum(share or 0.0 for share in shares) == pytest.approx(1.0, rel=1e-5)
        for row, diagnosis in zip(rows, output.diagnosis.values(), strict=True):
            cosine = row @ rows[0] / np.linalg.norm(row) / np.linalg.norm(rows[0])
            assert diagnosis.cosine_with_base == pytest.approx(cosine, abs=1e-5)
            assert diagnosis.conflicts is bool(cosine < 0)


# PCGrad


@pytest.mark.asyncio
async def test_surgery_by_hand():
    # Base (1, 0), regularizer (-1, 1): product -1.
    # Base without its part along (-1, 1): (1, 0) + 1/2 (-1, 1) = (1/2, 1/2); the regularizer without its part along
    # (1, 0): (0, 1). Sum (1/2, 3/2).
    pipeline = Pipeline(linear(1.0, 0.0), [spec(linear(-1.0, 1.0), "r")], combine="pcgrad", track_grad_norms=True)
    assert torch.allclose(await gradient_of(pipeline), torch.tensor([0.5, 1.5]))
    output = await pipeline.compute([], torch.zeros(2))
    assert output.total_grad_norm == pytest.approx(math.sqrt(2.5))
    assert output.diagnosis["base_loss"].share_of_total == pytest.approx((0.25 + 0.75) / 2.5)
    assert output.diagnosis["r"].share_of_total == pytest.approx(1.5 / 2.5)
    assert output.diagnosis["r"].cosine_with_total == pytest.approx(1 / math.sqrt(2 * 2.5))


@pytest.mark.asyncio
async def test_surgery_leaves_terms_that_agree():
    specs = [spec(linear(1.0, 1.0), "a", 0.5), spec(linear(0.0, 3.0), "b", 2.0)]
    pipeline = Pipeline(linear(1.0, 0.0), specs, combine="pcgrad")
    assert torch.allclose(await gradient_of(pipeline), torch.tensor([1.5, 6.5]))


def reference_surgery(names: list[str], gradients: list[np.ndarray], step: int) -> np.ndarray:
    """Algorithm 1 of Yu et al. as written, on whole vectors, in the order that `without_conflicts` documents."""
    by_name = sorted(range(len(names)), key=lambda index: names[index])
    total = np.zeros_like(gradients[0])
    for i in by_name:
        own = gradients[i].copy()
        others = [j for j in by_name if j != i]
        random.Random(f"{step} {names[i]}").shuffle(others)
        for j in others:
            product = own @ gradients[j]
            if product < 0:
                own = own - product / (gradients[j] @ gradients[j]) * gradients[j]
        total += own
    return total


@given(seed=st.integers(0, 10_000), count=st.integers(2, 6), step=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_surgery_is_the_algorithm_of_the_paper(seed: int, count: int, step: int):
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((count, 9))
    scales = draw.uniform(0.1, 3.0, count)
    names = [f"term {index}" for index in draw.permutation(count)]
    parts = [
        WeightedGradient(name, scale, torch.tensor(row), float(np.linalg.norm(row)))
        for name, scale, row in zip(names, scales, rows, strict=True)
    ]
    total = without_conflicts(parts, torch.zeros(9, dtype=torch.float64), step=step).gradient
    expected = reference_surgery(names, list(rows * scales[:, None]), step)
    assert np.allclose(total.numpy(), expected, rtol=1e-9, atol=1e-9)
    reordered = without_conflicts(parts[::-1], torch.zeros(9, dtype=torch.float64), step=step).gradient
    assert np.allclose(reordered.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_surgery_with_terms_that_have_no_gradient():
    parts = [
        WeightedGradient("base_loss", 1.0, torch.tensor([1.0, 1.0]), None),
        WeightedGradient("zero", 1.0, None, None),
    ]
    combined = without_conflicts(parts, torch.zeros(2), step=0)
    assert combined.gradient.tolist() == [1.0, 1.0]
    assert combined.diagnosis["zero"].cosine_with_total is None


# Clipping


@pytest.mark.asyncio
async def test_a_gradient_is_clipped_before_its_weight():
    # The gradient (3, 4) has norm 5 and is clipped to 1: (0.6, 0.8), times 2.
    clipped = spec(linear(3.0, 4.0), "r", 2.0, max_grad_norm=1.0)
    pipeline = Pipeline(linear(1.0, 0.0), [clipped])
    assert torch.allclose(await gradient_of(pipeline), torch.tensor([2.2, 1.6]))
    output = await pipeline.compute([], torch.full((2,), -1.0))
    own = output.regularizers["r"]
    assert own.clip_scale == pytest.approx(0.2)
    assert own.grad_norm == pytest.approx(5.0)
    assert own.value == -7.0
    assert output.loss_total == -1.0 - 14.0


@pytest.mark.asyncio
async def test_a_small_gradient_is_not_scaled_up():
    loose = spec(linear(3.0, 4.0), "r", 1.0, max_grad_norm=5.0)
    output = await Pipeline(linear(1.0, 0.0), [loose]).compute([], torch.zeros(2))
    assert output.regularizers["r"].clip_scale == 1.0
    zero = spec(lambda data, logprobs: (logprobs * 0).sum(), "zero", max_grad_norm=0.5)
    assert (await Executor.execute_one(zero, [], torch.zeros(2))).clip_scale == 1.0


# Products


@given(seed=st.integers(0, 1000), size=st.integers(0, 200_000))
@settings(max_examples=20, deadline=None)
def test_products_are_exact_enough(seed: int, size: int):
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, size, generator=generator)
    exact = float((one.double() * other.double()).sum())
    scale = float(one.double().norm() * other.double().norm()) or 1.0
    assert abs(dot(one, other) - exact) <= 1e-6 * scale
    assert dot(one, None) == dot(None, other) == 0.0


def test_products_of_gradients_that_share_memory_with_one_number():
    expanded = torch.tensor(2.0).expand(5)
    assert dot(expanded, torch.arange(5.0)) == 20.0
    assert dot(torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)) == 3.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 4097, 262_145])
def test_the_sum_of_any_size_and_dtype(dtype: torch.dtype, size: int):
    generator = torch.Generator().manual_seed(size)
    gradients = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)]
    parts = [WeightedGradient(str(index), 0.3 * index - 0.5, gradient, 1.0) for index, gradient in enumerate(gradients)]
    parts.append(WeightedGradient("none", 2.0, None, 0.0))
    exact = sum(((0.3 * index - 0.5) * gradient.double() for index, gradient in enumerate(gradients)), start=0.0)

    whole = summed(parts, gradients[0], diagnose=True)
    assert whole.gradient.dtype is dtype
    assert torch.equal(summed(parts, gradients[0], diagnose=False).gradient, whole.gradient)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(whole.gradient.double(), torch.as_tensor(exact), rtol=tolerance, atol=tolerance)
    assert whole.norm == pytest.approx(float(torch.as_tensor(exact).norm()), rel=max(tolerance, 1e-6))


@pytest.mark.asyncio
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("combine", ["sum", "pcgrad"])
async def test_a_sum_too_large_for_its_dtype_is_refused(track: bool, combine: Any):
    logprobs = torch.full((3,), -1.0, dtype=torch.float16)
    terms = [spec(lambda data, p: p.float().sum() * 40_000, "large", 1.0)]
    pipeline = Pipeline(lambda data, p: p.float().sum() * 40_000, terms, track_grad_norms=track, combine=combine)
    with pytest.raises(NonFiniteLoss, match="3 NaN or infinite element"):
        await pipeline.compute([], logprobs)
