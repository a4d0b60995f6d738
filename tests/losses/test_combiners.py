"""Combiners in a pipeline: scales, zero gradients, conflicts, and what holds for any gradients."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.losses.support import spec
from tests.losses.test_combine import gradient_of, linear
from tinkex_py import CustomLossOutput, Pipeline, PipelineError
from tinkex_py.losses.combiners import aligned, balancing_factors, cagrad, mgda, nash, upgrad

METHODS = ["upgrad", "mgda", "cagrad", "nash_mtl", "aligned_mtl"]
each_method = pytest.mark.parametrize("method", METHODS)
SEEDS = st.integers(0, 10_000)


def rows_of(seed: int, count: int, size: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size))


def total(method: Any, rows: np.ndarray, scales: Any = None) -> np.ndarray:
    """The total gradient."""
    weights = np.ones(len(rows)) if scales is None else np.asarray(scales, float)
    return (balancing_factors(method, rows @ rows.T, weights) * weights) @ rows


# Published methods, against other ways to solve them


@given(seed=SEEDS, count=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_shortest_combination_has_no_shorter_one(seed: int, count: int):
    gram = (rows := rows_of(seed, count)) @ rows.T
    found = mgda(gram)
    assert found.sum() == pytest.approx(1.0)
    assert (found >= 0).all()
    # KKT: every product with the result is at least its square.
    assert (gram @ found >= found @ gram @ found - 1e-9).all()


@given(seed=SEEDS, count=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_upgrad_opposes_no_gradient_and_is_pcgrad_for_two(seed: int, count: int):
    gram = (rows := rows_of(seed, count)) @ rows.T
    found = upgrad(gram, np.ones(count))
    assert (gram @ found >= -1e-9).all()
    assert (found >= 1.0 - 1e-9).all()
    if count == 2:
        product = min(0.0, gram[0, 1])
        np.testing.assert_allclose(found, 1.0 - product / np.diag(gram))


@given(seed=SEEDS, count=st.integers(2, 6), radius=st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_cagrad_is_on_the_ball_and_best_for_the_worst_term(seed: int, count: int, radius: float):
    rows = rows_of(seed, count)
    gram, mean = rows @ rows.T, np.full(count, 1.0 / count)
    found = cagrad(gram, radius)
    size = radius * math.sqrt(mean @ gram @ mean)
    weights = found - mean
    assert math.sqrt(weights @ gram @ weights) == pytest.approx(size)
    assert (weights >= -1e-9).all()
    # KKT of the weights on the simplex: the terms that the direction favors gain the least, and all the same.
    gains = gram @ found
    np.testing.assert_allclose(gains[weights > 1e-9], gains.min(), atol=1e-7 * np.abs(gram).max())


@given(seed=SEEDS, count=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_bargain_gives_every_term_its_power(seed: int, count: int):
    gram = (rows := rows_of(seed, count)) @ rows.T
    powers = np.random.default_rng(seed).uniform(0.1, 3.0, count)
    found = nash(gram, powers)
    np.testing.assert_allclose(found * (gram @ found), powers, rtol=1e-6)
    if count == 2:
        cosine = gram[0, 1] / math.sqrt(gram[0, 0] * gram[1, 1])
        expected = 1 / np.sqrt(np.diag(gram)) / math.sqrt(1 + cosine)
        np.testing.assert_allclose(nash(gram, np.ones(2)), expected, rtol=1e-6)


@given(seed=SEEDS, count=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_principal_components_are_aligned(seed: int, count: int):
    """The rows of the balanced matrix are orthogonal and as long as the shortest component."""
    rows = rows_of(seed, count)
    left, sizes, right = np.linalg.svd(rows, full_matrices=False)
    expected = sizes.min() * (left @ right).sum(0)
    np.testing.assert_allclose(aligned(rows @ rows.T) @ rows, expected, atol=1e-6)


# In a pipeline


@each_method
@given(seed=SEEDS, count=st.integers(2, 5))
@settings(max_examples=10, deadline=None)
def test_gradients_of_one_direction_are_summed(method: str, seed: int, count: int):
    scales = np.random.default_rng(seed).uniform(0.1, 3.0, count)
    rows = np.ones((count, 1)) * rows_of(seed, 1)
    expected = scales.sum() * rows[0]
    if method in ("cagrad", "aligned_mtl"):  # the first goes further, the second is as long as the shortest
        size = np.linalg.norm(total(method, rows, scales)) / np.linalg.norm(expected)
        np.testing.assert_allclose(total(method, rows, scales), size * expected, rtol=1e-6)
    else:
        np.testing.assert_allclose(total(method, rows, scales), expected, rtol=1e-6)


@each_method
def test_terms_without_a_gradient_or_weight_stay_out(method: str):
    rows = np.array([[1.0, 0.0], [0.0, 0.0], [-0.5, 1.0], [3.0, 3.0]])
    alone = total(method, rows[[0, 2]])
    np.testing.assert_allclose(total(method, rows, [1.0, 1.0, 1.0, 0.0]), alone)
    np.testing.assert_allclose(total(method, rows[:2]), rows[0])  # one term is left


@each_method
def test_opposite_gradients(method: str):
    """No direction is better for both: those that look for one end at 0, and CAGrad at the edge of its ball."""
    rows = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert np.abs(total(method, rows)).max() < 1e-6
    unequal = np.array([[1.0, 0.0], [-3.0, 0.0]])
    # The mean is (-1, 0). Of (-1.5, 0) to (-0.5, 0), the last one is best for the first gradient.
    expected = [2 * -0.5, 0.0] if method == "cagrad" else [0.0, 0.0]
    if method != "aligned_mtl":  # its only component is that of the longer one
        np.testing.assert_allclose(total(method, unequal), expected, atol=1e-6)


@each_method
@given(seed=SEEDS, count=st.integers(2, 6), scale=st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=15, deadline=None)
def test_no_coefficient_is_negative_and_sizes_do_not_matter(method: str, seed: int, count: int, scale: float):
    rows = rows_of(seed, count, size=3)  # more gradients than dimensions: the products are singular
    scales = np.random.default_rng(seed).uniform(0.1, 3.0, count)
    factors = balancing_factors(method, rows @ rows.T, scales)
    assert np.isfinite(factors).all()
    assert (factors >= 0).all()
    scaled = balancing_factors(method, (scale * rows) @ (scale * rows).T, scales)
    np.testing.assert_allclose(scaled @ (scales[:, None] * rows), factors @ (scales[:, None] * rows), atol=1e-4)


def test_the_weight_is_the_power_of_a_term_and_its_scale_does_not_matter():
    rows = np.array([[1.0, 0.0], [-0.5, 1.0]])
    direction = total("nash_mtl", rows, [1.0, 4.0])
    bargain = nash(rows @ rows.T, np.array([1.0, 4.0])) @ rows
    np.testing.assert_allclose(direction / np.linalg.norm(direction), bargain / np.linalg.norm(bargain), rtol=1e-6)
    assert np.linalg.norm(direction) == pytest.approx(np.linalg.norm(np.array([1.0, 4.0]) @ rows))
    longer = total("nash_mtl", rows * [[1.0], [10.0]], [1.0, 4.0])
    np.testing.assert_allclose(longer / np.linalg.norm(longer), direction / np.linalg.norm(direction), rtol=1e-6)


def test_mgda_looks_at_directions_only():
    rows = np.array([[1.0, 0.0], [-0.5, 1.0]])
    direction, weighted = total("mgda", rows), total("mgda", rows, [1.0, 10.0])
    np.testing.assert_allclose(direction / np.linalg.norm(direction), weighted / np.linalg.norm(weighted))


def test_negative_coefficients_of_aligned_mtl_are_0():
    gram = np.array([[1.0, 3.0], [3.0, 9.5]])
    factors = balancing_factors("aligned_mtl", gram, np.ones(2))
    assert factors[0] == pytest.approx(0.645840, abs=1e-6)
    assert factors[1] == 0


@each_method
@pytest.mark.asyncio
async def test_the_output_has_the_coefficients_that_were_sent(method: Any):
    rows, weights = [(1.0, 0.0), (-0.5, 1.0)], [1.0, 2.0]
    pipeline = Pipeline(
        linear(*rows[0]), [spec(linear(*rows[1]), "r", weights[1])], combine=method, track_grad_norms=True
    )
    output = await pipeline.compute([], torch.full((2,), -1.0))
    gradient = await gradient_of(pipeline)
    factors = balancing_factors(method, np.array(rows) @ np.array(rows).T, np.array(weights))
    assert output.coefficients == pytest.approx({"base_loss": factors[0], "r": 2.0 * factors[1]}, rel=1e-5)
    np.testing.assert_allclose(gradient, np.array(list(output.coefficients.values())) @ rows, rtol=1e-5, atol=1e-6)
    assert output.total_grad_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert sum(own.share_of_total or 0.0 for own in output.diagnosis.values()) == pytest.approx(1.0, rel=1e-5)
    assert CustomLossOutput.model_validate_json(output.model_dump_json()) == output
    plain = await Pipeline(linear(*rows[0]), [spec(linear(*rows[1]), "r")]).compute([], torch.zeros(2))
    assert plain.coefficients == {}


@each_method
@pytest.mark.asyncio
async def test_more_terms_than_can_be_solved_exactly_are_refused(method: Any):
    specs = [spec(linear(*row), f"r{index}") for index, row in enumerate(rows_of(1, 8, 3))]
    with pytest.raises(PipelineError, match=f"combine='{method}' is solved exactly for at most 8 terms, .* got 9"):
        Pipeline(linear(1.0, 0.0, 0.0), specs, combine=method)
    late = Pipeline(linear(1.0, 0.0, 0.0), specs)
    late.combine = method
    with pytest.raises(PipelineError, match="got 9"):
        await late.compute([], torch.zeros(3))
    eight = Pipeline(linear(1.0, 0.0, 0.0), specs[:7], combine=method)
    assert len((await eight.compute([], torch.zeros(3))).coefficients) == 8
