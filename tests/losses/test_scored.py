"""Terms that return `Scored`: the gradient comes from elsewhere and counts like that of autograd."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.losses.support import GUIDE_VALUES, datum, guide_logprobs, l2, nll, spec
from tinkex_py import (
    InvalidTermResult,
    NonFiniteLoss,
    Pipeline,
    PipelineError,
    Scored,
    execute,
    per_datum,
    sum_over_datums,
)

X = np.array(GUIDE_VALUES, np.float32)
DATA = [datum(2), datum(3)]


def scored_l2(data: Any, logprobs: torch.Tensor) -> Scored:
    values = logprobs.detach().numpy()
    return Scored(float(np.square(values).sum()), 2 * values, {"largest": np.float32(values.max())})


async def async_scored(data: Any, logprobs: torch.Tensor) -> Scored:
    return scored_l2(data, logprobs)


def listed(data: Any, logprobs: torch.Tensor) -> Scored:
    return Scored(scored_l2(data, logprobs).value, (2 * logprobs.detach().double()).tolist())


def scored_parts(data: Any, parts: list[torch.Tensor]) -> Scored:
    own = [scored_l2(data, part) for part in parts]
    return Scored(sum(one.value for one in own), [one.gradient for one in own])


def one_datum(logprobs: torch.Tensor) -> Scored:
    return scored_l2(None, logprobs)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "fn",
    [scored_l2, async_scored, listed, per_datum(scored_parts), sum_over_datums(one_datum)],
    ids=["sync", "async", "listed", "per_datum", "sum_over_datums"],
)
@pytest.mark.parametrize("combine", ["sum", "pcgrad"])
async def test_equals_the_term_that_autograd_differentiates(fn: Any, combine: Any):
    """d(sum x^2)/dx = 2x exactly, in float32 as in float64."""
    results: list[Any] = []
    for term in (fn, l2):
        specs = [spec(term, "squares", 0.5, max_grad_norm=2.0)]
        pipeline = Pipeline(nll, specs, track_grad_norms=True, combine=combine)
        logprobs = guide_logprobs().requires_grad_()
        (await pipeline.loss(DATA, logprobs)).backward()
        results.append((await pipeline.compute(DATA, guide_logprobs()), logprobs.grad))
    (own, gradient), (usual, expected) = results
    assert torch.equal(gradient, expected)
    one, other = own.regularizers["squares"], usual.regularizers["squares"]
    assert one.value == pytest.approx(other.value, rel=1e-7)
    assert one.grad_norm == other.grad_norm == pytest.approx(2 * math.sqrt(float(np.square(X, dtype=np.float64).sum())))
    assert one.clip_scale == other.clip_scale < 1.0
    assert own.diagnosis == usual.diagnosis


@pytest.mark.asyncio
async def test_metrics_and_values_of_other_libraries_are_numbers():
    fn = lambda data, logprobs: Scored(np.float64(2.5), np.ones(5), {"a": torch.tensor(3), "b": True})  # noqa: E731
    output = (await Pipeline(nll, [spec(fn, "other")]).compute([], guide_logprobs())).regularizers["other"]
    assert (output.value, output.custom_metrics) == (2.5, {"a": 3, "b": True})


@pytest.mark.asyncio
async def test_no_gradient_is_no_dependence_on_the_logprobs():
    constant = Pipeline(lambda data, logprobs: Scored(3.0), track_grad_norms=True)
    assert (await constant.compute([], guide_logprobs())).base_loss.grad_norm == 0.0
    with pytest.raises(PipelineError, match="no term depends on the logprobs"):
        await constant.loss([], guide_logprobs())


@pytest.mark.asyncio
async def test_the_low_level_call_returns_a_loss_with_its_gradient():
    logprobs = guide_logprobs().requires_grad_()
    loss, metrics = await execute(scored_l2, [], logprobs)
    loss.backward()
    assert torch.equal(logprobs.grad, 2 * guide_logprobs())  # type: ignore[arg-type]
    assert metrics == {"largest": X.max()}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Scored("many", np.zeros(5)), "value of Scored must be a number, got 'many'"),
        (Scored(1.0, np.zeros(4)), r"shape of the logprobs, \(5,\), got shape \(4,\)"),
        (Scored(1.0, np.zeros(5, complex)), r"got shape \(5,\) of dtype torch.complex128"),
        (Scored(1.0, ["a"] * 5), r"got 5 of them|got \['a'"),
        (Scored(1.0, [[1.0], [2.0, 3.0]]), "got 2 of them"),
        (Scored(1.0, torch.zeros(5).to_sparse()), "layout torch.sparse_coo"),
    ],
)
async def test_what_is_no_gradient_is_refused(result: Scored, message: str):
    with pytest.raises(InvalidTermResult, match=message) as caught:
        await Pipeline(nll, [spec(lambda data, logprobs: result, "odd")]).compute([], guide_logprobs())
    assert caught.value.name == "odd"


@pytest.mark.asyncio
async def test_one_gradient_per_datum():
    fn = per_datum(lambda data, logprobs: Scored(1.0, [np.zeros(2)]))
    with pytest.raises(InvalidTermResult, match=r"one gradient per datum \(2\), got 1 of them"):
        await Pipeline(fn).compute(DATA, guide_logprobs())


@pytest.mark.asyncio
@pytest.mark.parametrize("result", [Scored(math.nan, np.zeros(5)), Scored(1.0, np.array([0, 0, math.inf, 0, 0]))])
async def test_what_is_not_finite_is_refused(result: Scored):
    with pytest.raises(NonFiniteLoss):
        await Pipeline(lambda data, logprobs: result).compute([], guide_logprobs())
